use super::*;

use reqwest::multipart::{Form, Part};

/// A picture of 2 by 2 pixels: red, green, blue, white.
fn four_colors() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 2, 2);
    encoder.set_color(png::ColorType::Rgb);
    let pixels = [255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 255];
    encoder.write_header().expect("a header").write_image_data(&pixels).expect("pixels");
    bytes
}

async fn upload(tunnel: &Tunnel, name: &str, bytes: &[u8], fields: &[(&str, &str)]) -> (u16, Value) {
    let mut form = Form::new().part("image", Part::bytes(bytes.to_vec()).file_name(name.to_owned()));
    for (field, value) in fields {
        form = form.text((*field).to_owned(), (*value).to_owned());
    }
    let url = format!("{}/upload/image", tunnel.url);
    let response = tunnel.http.post(url).multipart(form).send().await.expect("an answer");
    let status = response.status().as_u16();
    (status, response.json().await.unwrap_or_default())
}

#[tokio::test]
async fn an_upload_goes_through_the_nodes_and_comes_back() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    let (status, stored) = upload(&tunnel, "four.png", &four_colors(), &[]).await;
    assert_eq!((status, &stored), (200, &json!({ "name": "four.png", "subfolder": "", "type": "input" })));
    let names = tunnel.json("/object_info/LoadImage").await["LoadImage"]["input"]["required"]["image"][0].clone();
    assert_eq!(names, json!(["four.png"]));

    let workflow = |method: &str, width: u32| {
        json!({
            "1": { "class_type": "LoadImage", "inputs": { "image": "four.png" } },
            "2": { "class_type": "ImageInvert", "inputs": { "image": ["1", 0] } },
            "3": { "class_type": "ImageScale", "inputs": {
                "image": ["2", 0], "upscale_method": method, "width": width, "height": 0, "crop": "disabled" } },
            "4": { "class_type": "SaveImage", "inputs": { "images": ["3", 0], "filename_prefix": method } },
        })
    };
    let saved = async |method: &str, width: u32| {
        let id = tunnel.submit(workflow(method, width), "me").await;
        let entry = tunnel.history(&id).await;
        let name = entry["outputs"]["4"]["images"][0]["filename"].as_str().expect("a file").to_owned();
        let file = tunnel.get(&format!("/view?filename={name}&subfolder=&type=output")).await;
        decode(&file.bytes().await.expect("bytes"))
    };
    let (cyan, magenta, yellow, black) = ([0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]);
    let upper = [cyan, cyan, magenta, magenta].concat();
    let lower = [yellow, yellow, black, black].concat();
    assert_eq!(saved("nearest-exact", 4).await, (4, 4, [upper.clone(), upper, lower.clone(), lower].concat()));
    // All four mixed.
    assert_eq!(saved("bilinear", 1).await, (1, 1, vec![128, 128, 128]));

    // Another picture under the same name is another picture, not the remembered one.
    upload(&tunnel, "four.png", &four_colors()[..20], &[("overwrite", "true")]).await;
    let id = tunnel.submit(workflow("bilinear", 1), "me").await;
    let entry = tunnel.history(&id).await;
    let last = entry["status"]["messages"].as_array().expect("messages").last().expect("one").clone();
    assert_eq!(last[1]["exception_type"], "PIL.UnidentifiedImageError");
}

#[tokio::test]
async fn names_are_given_anew_unless_told_to_overwrite() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    let name = async |bytes: &[u8], fields: &[(&str, &str)]| {
        let (status, stored) = upload(&tunnel, "x.png", bytes, fields).await;
        assert_eq!(status, 200);
        stored["name"].as_str().expect("a name").to_owned()
    };
    assert_eq!(name(b"one", &[]).await, "x.png");
    assert_eq!(name(b"one", &[]).await, "x.png");
    assert_eq!(name(b"two", &[]).await, "x (1).png");
    assert_eq!(name(b"two", &[]).await, "x (1).png");
    assert_eq!(name(b"three", &[]).await, "x (2).png");
    assert_eq!(name(b"four", &[("overwrite", "1")]).await, "x.png");
    assert_eq!(std::fs::read(pod.disk().join("ComfyUI/input/x.png")).expect("the file"), b"four");
    let (_, stored) = upload(&tunnel, "x.png", b"deep", &[("subfolder", "a/b"), ("type", "temp")]).await;
    assert_eq!(stored, json!({ "name": "x.png", "subfolder": "a/b", "type": "temp" }));
    let file = tunnel.get("/view?filename=x.png&subfolder=a/b&type=temp").await;
    assert_eq!(file.bytes().await.expect("bytes"), &b"deep"[..]);
}

#[tokio::test]
async fn no_name_leads_out_of_its_folder() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    let disk = pod.disk();
    std::fs::write(disk.join("secret.png"), b"secret").expect("written");
    std::os::unix::fs::symlink(&disk, disk.join("ComfyUI/input/link")).expect("a link");
    std::os::unix::fs::symlink(disk.join("secret.png"), disk.join("ComfyUI/input/link.png")).expect("a link");

    let secret = disk.join("secret.png").display().to_string();
    for query in [
        "filename=../../secret.png&type=input".to_owned(),
        "filename=..%2F..%2Fsecret.png&type=input".to_owned(),
        format!("filename={secret}&type=input"),
        "filename=secret.png&type=input&subfolder=../..".to_owned(),
        "filename=secret.png&type=input&subfolder=a/../../..".to_owned(),
        format!("filename=secret.png&type=input&subfolder={}", disk.display()),
        "filename=secret.png&type=input&subfolder=link".to_owned(),
        "filename=link.png&type=input".to_owned(),
        "filename=secret.png&type=..".to_owned(),
        "filename=secret.png&type=".to_owned(),
        "filename=secret.png%00&type=input".to_owned(),
        "filename=.&type=input".to_owned(),
        "filename=&type=input".to_owned(),
        "type=input".to_owned(),
    ] {
        let status = tunnel.get(&format!("/view?{query}")).await.status().as_u16();
        assert!([400, 403, 404].contains(&status), "{query} gave {status}");
    }

    let before = tree(&disk);
    for (name, fields) in [
        ("../../evil.png", &[][..]),
        ("/tmp/evil.png", &[]),
        ("..", &[]),
        (".", &[]),
        ("a/b.png", &[]),
        ("a\\b.png", &[]),
        ("evil.png", &[("subfolder", "../..")]),
        ("evil.png", &[("subfolder", "/tmp")]),
        ("evil.png", &[("subfolder", "a/../../b")]),
        ("evil.png", &[("subfolder", "link/deeper")]),
        ("evil.png", &[("type", "models")]),
        ("evil.png", &[("type", "../..")]),
    ] {
        let (status, _) = upload(&tunnel, name, b"evil", fields).await;
        assert_eq!(status, 400, "{name} {fields:?}");
    }
    assert_eq!(tree(&disk), before);
    // A link is not written through, even when told to overwrite.
    let (_, stored) = upload(&tunnel, "link.png", b"evil", &[("overwrite", "true")]).await;
    assert_eq!(stored["name"], "link (1).png");
    assert_eq!(std::fs::read(disk.join("secret.png")).expect("the file"), b"secret");
}

#[tokio::test]
async fn files_can_be_had_in_parts() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    upload(&tunnel, "digits", b"0123456789", &[]).await;
    let url = format!("{}/view?filename=digits&type=input&subfolder=", tunnel.url);
    for (range, status, body) in [
        ("bytes=0-3", 206, "0123"),
        ("bytes=8-", 206, "89"),
        ("bytes=-3", 206, "789"),
        ("bytes=5-500", 206, "56789"),
        ("bytes=10-", 416, ""),
        ("lines=1-2", 200, "0123456789"),
    ] {
        let response = tunnel.http.get(&url).header("Range", range).send().await.expect("an answer");
        assert_eq!(response.status(), status, "{range}");
        assert_eq!(response.text().await.expect("a body"), body, "{range}");
    }
    let tag = tunnel.http.get(&url).send().await.expect("an answer").headers()["etag"].clone();
    let again = tunnel.http.get(&url).header("If-None-Match", tag).send().await.expect("an answer");
    assert_eq!(again.status(), 304);
}

#[tokio::test]
async fn models_are_listed_from_the_volume() {
    let closed = Pod::closed().await;
    let volume = closed.home.path().join("volume");
    std::fs::create_dir_all(volume.join("models/loras")).expect("a folder");
    std::fs::create_dir_all(volume.join("models/embeddings")).expect("a folder");
    std::fs::write(volume.join("models/loras/b.safetensors"), b"").expect("a file");
    std::fs::write(volume.join("models/loras/a.safetensors"), b"").expect("a file");
    std::fs::write(volume.join("models/embeddings/bad hands.pt"), b"").expect("a file");
    let keys = std::fs::read_to_string(closed.home.path().join("ssh/id_ed25519.pub")).expect("the key");
    let spec = ContainerSpec { volume: Some((volume, "/workspace".into())), ..Pod::spec(&closed.home, keys) };
    let container = Container::start(spec).await.expect("started");
    let pod = Pod { container: Arc::new(container), home: closed.home };
    pod.container.open_ssh().await.expect("sshd");
    pod.container.open_comfy().await.expect("ComfyUI");
    let tunnel = pod.tunnel().await;
    assert_eq!(tunnel.json("/models/loras").await, json!(["a.safetensors", "b.safetensors"]));
    assert_eq!(tunnel.json("/embeddings").await, json!(["bad hands"]));
    // The volume outlives the container.
    pod.container.stop().await;
    assert!(pod.home.path().join("volume/models/loras/a.safetensors").exists());
}

/// Every path below a folder, links not followed.
fn tree(folder: &Path) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let entry = entry.expect("an entry");
        paths.push(entry.path());
        if entry.file_type().expect("its type").is_dir() {
            paths.extend(tree(&entry.path()));
        }
    }
    paths.sort();
    paths
}
