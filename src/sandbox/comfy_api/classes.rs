//! The node classes of the sandbox: their inputs and outputs, for validation and for `/object_info`.

use serde_json::{Map, Value, json};

use super::files::Files;

pub struct NodeClass {
    pub name: &'static str,
    pub display_name: &'static str,
    pub description: &'static str,
    pub category: &'static str,
    /// All required; none of these classes has optional inputs.
    pub inputs: &'static [(&'static str, Input)],
    /// Type names, in the order of their slots.
    pub outputs: &'static [&'static str],
    pub output_node: bool,
}

pub enum Input {
    /// A link to an output of this type.
    Link(&'static str),
    Int {
        default: u64,
        min: u64,
        max: u64,
        /// Further keys of the input's configuration.
        hints: &'static [(&'static str, &'static str)],
    },
    Text {
        default: &'static str,
    },
    Choice(&'static [&'static str]),
    /// The name of a file in the input folder.
    File,
}

const MAX_RESOLUTION: u64 = 16_384;
const COLOR: &[(&str, &str)] = &[("display", "color")];

/// Every class, in the order of `/object_info`.
pub const CLASSES: &[NodeClass] = &[
    NodeClass {
        name: "SaveImage",
        display_name: "Save Image",
        description: "Saves the input images to your ComfyUI output directory.",
        category: "image",
        inputs: &[("images", Input::Link("IMAGE")), ("filename_prefix", Input::Text { default: "ComfyUI" })],
        outputs: &[],
        output_node: true,
    },
    NodeClass {
        name: "PreviewImage",
        display_name: "Preview Image",
        description: "Saves the input images to your ComfyUI temp directory.",
        category: "image",
        inputs: &[("images", Input::Link("IMAGE"))],
        outputs: &[],
        output_node: true,
    },
    NodeClass {
        name: "LoadImage",
        display_name: "Load Image",
        description: "",
        category: "image",
        inputs: &[("image", Input::File)],
        outputs: &["IMAGE", "MASK"],
        output_node: false,
    },
    NodeClass {
        name: "ImageScale",
        display_name: "Upscale Image",
        description: "",
        category: "image/upscaling",
        inputs: &[
            ("image", Input::Link("IMAGE")),
            ("upscale_method", Input::Choice(&["nearest-exact", "bilinear"])),
            ("width", Input::Int { default: 512, min: 0, max: MAX_RESOLUTION, hints: &[] }),
            ("height", Input::Int { default: 512, min: 0, max: MAX_RESOLUTION, hints: &[] }),
            ("crop", Input::Choice(&["disabled", "center"])),
        ],
        outputs: &["IMAGE"],
        output_node: false,
    },
    NodeClass {
        name: "ImageInvert",
        display_name: "Invert Image",
        description: "",
        category: "image",
        inputs: &[("image", Input::Link("IMAGE"))],
        outputs: &["IMAGE"],
        output_node: false,
    },
    NodeClass {
        name: "EmptyImage",
        display_name: "EmptyImage",
        description: "",
        category: "image",
        inputs: &[
            ("width", Input::Int { default: 512, min: 1, max: MAX_RESOLUTION, hints: &[] }),
            ("height", Input::Int { default: 512, min: 1, max: MAX_RESOLUTION, hints: &[] }),
            ("batch_size", Input::Int { default: 1, min: 1, max: 4096, hints: &[] }),
            ("color", Input::Int { default: 0, min: 0, max: 0xFF_FFFF, hints: COLOR }),
        ],
        outputs: &["IMAGE"],
        output_node: false,
    },
    NodeClass {
        name: "SandboxSampler",
        display_name: "Sandbox Sampler",
        description: "Paints a picture from a seed, step by step, as slowly as a sampler would.",
        category: "sandbox",
        inputs: &[
            ("width", Input::Int { default: 512, min: 16, max: 2048, hints: &[] }),
            ("height", Input::Int { default: 512, min: 16, max: 2048, hints: &[] }),
            ("steps", Input::Int { default: 20, min: 1, max: 100, hints: &[] }),
            ("seed", Input::Int { default: 0, min: 0, max: u64::MAX, hints: &[] }),
            ("step_ms", Input::Int { default: 40, min: 0, max: 10_000, hints: &[] }),
        ],
        outputs: &["IMAGE"],
        output_node: false,
    },
];

pub fn find(name: &str) -> Option<&'static NodeClass> {
    CLASSES.iter().find(|class| class.name == name)
}

impl NodeClass {
    /// The class's entry in `/object_info`.
    pub fn describe(&self, files: &Files) -> Value {
        let required: Map<String, Value> =
            self.inputs.iter().map(|(name, input)| ((*name).to_owned(), input.config(name, files))).collect();
        let order: Vec<&str> = self.inputs.iter().map(|(name, _)| *name).collect();
        let (mut input, mut input_order) = (json!({ "required": required }), json!({ "required": order }));
        if self.output_node {
            input["hidden"] = json!({ "prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO" });
            input_order["hidden"] = json!(["prompt", "extra_pnginfo"]);
        }
        json!({
            "input": input,
            "input_order": input_order,
            "output": self.outputs,
            "output_is_list": vec![false; self.outputs.len()],
            "output_name": self.outputs,
            "name": self.name,
            "display_name": self.display_name,
            "description": self.description,
            "python_module": "nodes",
            "category": self.category,
            "output_node": self.output_node,
        })
    }
}

impl Input {
    /// The type's name; a choice's is its list.
    pub fn type_name(&self) -> &'static str {
        match self {
            Input::Link(kind) => kind,
            Input::Int { .. } => "INT",
            Input::Text { .. } => "STRING",
            Input::Choice(_) | Input::File => "COMBO",
        }
    }

    /// ComfyUI's description of the input: `[type or choices, {settings}]`.
    pub fn config(&self, name: &str, files: &Files) -> Value {
        match self {
            Input::Link(kind) => json!([kind]),
            Input::Int { default, min, max, hints } => {
                let mut settings = json!({ "default": default, "min": min, "max": max });
                for (key, value) in *hints {
                    settings[key] = json!(value);
                }
                if name == "seed" {
                    settings["control_after_generate"] = json!(true);
                }
                json!(["INT", settings])
            }
            Input::Text { default } => json!(["STRING", { "default": default }]),
            Input::Choice(choices) => json!([choices]),
            Input::File => json!([files.input_names(), { "image_upload": true }]),
        }
    }
}
