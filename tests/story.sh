#!/bin/sh
# The whole story from a shell: every step is one process, and nothing but grep and sed reads the answers.
# Wants AUTOPOD (the program) and AUTOPOD_HOME; prints the picture's path last.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
  echo "story.sh: $*" >&2
  cat "$work/answer" "$work/errors" >&2
  exit 1
}

# step TOOL [JSON]: one call; its answer is in $work/answer.
step() {
  "$AUTOPOD" call --sandbox "$@" >"$work/answer" 2>"$work/errors" || fail "$1 ended with exit code $?"
}

# has TEXT: the answer has it.
has() {
  grep -qF -- "$1" "$work/answer" || fail "the answer lacks: $1"
}

# value NAME: the first value of that name, without quotes.
value() {
  sed -n 's/^ *"'"$1"'": "\{0,1\}\([^",]*\)"\{0,1\},\{0,1\}$/\1/p' "$work/answer" | sed -n 1p
}

step list_gpus '{"min_vram_gb": 16}'
has '"price_per_hour"'
step list_volumes
has '"name": "comfy-models"'

step create_pod_with_volume '{"volume": "comfy-models", "lifetime_minutes": 10}'
has '"done": true'
pod=$(value pod)
[ "$pod" = comfy ] || fail "the pod is called $pod"

step start_tunnel '{"pod": "comfy"}'
has '"done": true'
url=$(value url)

step comfy_status
has '"ready": true'
has "\"url\": \"$url\""

echo '{"workflow": {
  "1": {"class_type": "SandboxSampler", "inputs": {"width": 256, "height": 256, "steps": 24, "seed": 7, "step_ms": 60}},
  "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "story"}}
}}' >"$work/run.json"
"$AUTOPOD" --sandbox call comfy_run - <"$work/run.json" >"$work/answer" 2>"$work/errors" || fail "comfy_run ended with exit code $?"
has '"done": true'
picture=$(value path)
run=$(value prompt_id)
told=$(grep -cE 'step [0-9]+ of 24' "$work/errors") || fail "no progress was told"
[ "$told" -ge 5 ] || fail "progress was told only $told times"

step comfy_queue '{"history": 1}'
has "\"job\": \"$run\""
step comfy_job "{\"prompt_id\": \"$run\"}"
has "\"path\": \"$picture\""
step get_pod
has '"status": "RUNNING"'
step list_pods
has '"owner": "ours"'

step terminate_pod '{"pod": "comfy"}'
has '"state": "gone"'
has '"still_billing": "no"'
step list_pods
has '"pods": []'
step list_tunnels
has '"tunnels": []'

echo "$picture"
