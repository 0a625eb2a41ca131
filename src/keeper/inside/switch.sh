# The pod's own switch: ends the pod from inside at its deadline, though nobody outside is left to do it.
#
# Given to `sh -c` as text, its words being: STEP SECONDS ORIGIN TOKEN ENVIRON_FILE; `arm` takes the
# seconds that are left and starts a `watch`, which takes the second that is the deadline. It needs sh, the POSIX
# utilities and one of curl, wget, python3. Each arming has a token of its own; a loop ends when the file names another
# one, so the newest arming is the only one that counts. The key stays out of every command line.

say_not_armed() {
	printf 'AUTOPOD_NOT_ARMED %s\n' "$1"
	exit 0
}

# The value of a variable that the container was started with; sessions over SSH don't inherit them.
container_variable() {
	{ tr '\0\n' '\n ' <"$environ"; } 2>/dev/null | sed -n "s/^$1=//p" | head -n 1
}

find_container() {
	pod_id=$(container_variable RUNPOD_POD_ID)
	key=$(container_variable RUNPOD_API_KEY)
}

# A program that can send the request, with the key neither in its arguments nor in a file that others can read.
find_client() {
	if curl --version >/dev/null 2>&1; then
		client=curl
	elif wget --help 2>/dev/null | grep -q -e '--config'; then
		client=wget
	elif python3 -c 'import urllib.request, ssl' >/dev/null 2>&1; then
		client=python3
	else
		client=
	fi
}

ask_by_curl() {
	printf 'header = "Authorization: Bearer %s"\n' "$key" |
		curl -q -sS -K - -o /dev/null -w '%{http_code}' --max-time 20 -X POST -A "$agent" \
			-H 'Content-Type: application/json' --data "$body" "$url" 2>/dev/null
}

# It reads its settings from nothing but a file.
ask_by_wget() {
	settings=$folder/wget.$token
	(umask 077 && printf 'header = Authorization: Bearer %s\n' "$key" >"$settings")
	wget --config="$settings" -nv -S -O /dev/null --tries=1 --timeout=20 --max-redirect=0 --user-agent="$agent" \
		--header='Content-Type: application/json' --post-data="$body" "$url" 2>&1 |
		sed -n 's|^ *HTTP/[0-9.]* \([0-9][0-9]*\).*|\1|p' | tail -n 1
	rm -f "$settings"
}

ask_by_python3() {
	printf '%s' "$key" | python3 -c '
import sys, urllib.error, urllib.request
url, agent, body = sys.argv[1:]
headers = {"Authorization": "Bearer " + sys.stdin.read(), "Content-Type": "application/json", "User-Agent": agent}
request = urllib.request.Request(url, body.encode(), headers, method="POST")
try:
    print(urllib.request.urlopen(request, timeout=20).status)
except urllib.error.HTTPError as error:
    print(error.code)
' "$url" "$agent" "$body" 2>/dev/null
}

# Whether the file names another arming. A file that is missing or can't be read is no reason to let the pod run on.
is_replaced() {
	named=
	{ read -r named _ <"$state"; } 2>/dev/null
	[ -n "$named" ] && [ "$named" != "$token" ]
}

# Until the deadline, looking up from sleep often enough to notice a newer arming and a clock that jumped.
wait_for_deadline() {
	while :; do
		is_replaced && return 1
		left=$((deadline - $(date +%s)))
		[ "$left" -le 0 ] && return 0
		[ "$left" -gt 30 ] && left=30
		sleep "$left"
	done
}

# Until the pod is gone for its provider, which ends this loop too if the provider means it.
end_pod() {
	url=$origin/v2/pods/$pod_id/action
	body='{"action":"terminate"}'
	agent=autopod-switch/1
	while :; do
		[ "$("ask_by_$client")" = 404 ] && return
		sleep 30
		is_replaced && return
	done
}

watch() {
	trap 'rm -f "$running"' EXIT
	find_client
	printf '%s\n' "$$" >"$running.new" && mv -f "$running.new" "$running"
	wait_for_deadline && end_pod
}

is_running() {
	watcher=
	{ read -r watcher <"$running"; } 2>/dev/null
	[ -n "$watcher" ] && kill -0 "$watcher" 2>/dev/null
}

# In a session of its own, and with none of this channel's streams, so that it survives the channel's end.
start_watching() {
	if command -v setsid >/dev/null 2>&1; then
		detach=setsid
	else
		detach=nohup
	fi
	$detach sh -c "$AUTOPOD_SWITCH" autopod-switch watch "$deadline" "$origin" "$token" "$environ" \
		</dev/null >/dev/null 2>&1 &
	tries=0
	until is_running; do
		tries=$((tries + 1))
		[ "$tries" -gt 50 ] && return 1
		sleep 0.1 2>/dev/null || sleep 1
	done
}

check_container() {
	[ -n "$pod_id" ] || say_not_armed 'the container has no RUNPOD_POD_ID'
	[ -n "$key" ] || say_not_armed 'the container has no RUNPOD_API_KEY of its own'
	case $pod_id in
	*[!A-Za-z0-9_-]*) say_not_armed "the container's RUNPOD_POD_ID is not one" ;;
	esac
	case $key in
	*[!A-Za-z0-9._~+/=-]*) say_not_armed "the container's RUNPOD_API_KEY is not one" ;;
	esac
}

arm() {
	find_client
	[ -n "$client" ] || say_not_armed 'the image has neither curl nor wget nor python3'
	{ mkdir -p "$folder" && chmod 700 "$folder"; } 2>/dev/null || say_not_armed "$folder can't be made"
	now=$(date +%s) || say_not_armed 'the image has no date'
	deadline=$((now + remaining))
	{ printf '%s %s\n' "$token" "$deadline" >"$state.$token" && mv -f "$state.$token" "$state"; } 2>/dev/null ||
		say_not_armed "$folder can't be written"
	start_watching || say_not_armed 'the loop does not run'
	printf 'AUTOPOD_ARMED %s\n' "$deadline"
}

step=$1 origin=$3 token=$4 environ=$5
find_container
check_container
# On the container's own disk, never on the volume, which other pods may share.
folder=${TMPDIR:-/tmp}/autopod-switch-$pod_id
state=$folder/armed
running=$folder/running.$token
case $step in
arm)
	remaining=$2
	arm
	;;
watch)
	deadline=$2
	watch
	;;
esac
