//! Faults that befall a pod: where it lands, what it becomes, what it costs.

use serde_json::{Value, json};

use super::{Tested, pod_body};

impl Tested {
    /// The pod's status after a create or start and enough time to come up.
    async fn come_up(&self, id: &str) -> Value {
        self.advance(7.0).await;
        self.pod(id).await
    }
}

#[tokio::test]
async fn a_pod_lands_elsewhere() {
    let world = Tested::new().await;
    let mut body = pod_body("comfy");
    body["dataCenterIds"] = json!(["EU-RO-1"]);
    for (fault, lands) in [(json!({ "data_center": "US-TX-3" }), "US-TX-3"), (json!({}), "US-KS-2")] {
        let mut fault = fault;
        fault["operation"] = json!("createPod");
        fault["kind"] = json!("elsewhere");
        world.fault(fault).await;
        let (status, pod) = world.post("/v2/pods", body.clone()).await;
        assert_eq!(status, 201, "{pod}");
        let pod = world.come_up(pod["id"].as_str().expect("an id")).await;
        assert_eq!((&pod["status"], &pod["dataCenterId"]), (&json!("RUNNING"), &json!(lands)));
    }
    let (_, pod) = world.post("/v2/pods", body).await;
    assert_eq!(world.come_up(pod["id"].as_str().expect("an id")).await["dataCenterId"], "EU-RO-1");
    world.finish().await;
}

#[tokio::test]
async fn a_pod_goes_to_error_at_each_stage() {
    let world = Tested::new().await;
    let stages = [
        ("allocating", 2.0, "PROVISIONING"),
        ("starting", 2.0, "STARTING"),
        ("container_up", 1.0, "RUNNING"),
        ("ssh_up", 2.0, "RUNNING"),
    ];
    let mut up_to = 0.0;
    for (stage, lasts, status) in stages {
        world.fault(json!({ "operation": "createPod", "kind": "error_state", "stage": stage })).await;
        let id = world.create(stage).await;
        world.advance(up_to + lasts - 0.1).await;
        assert_eq!(world.pod(&id).await["status"], status, "{stage}");
        world.advance(0.1).await;
        let pod = world.pod(&id).await;
        assert_eq!((&pod["status"], &pod["actions"]), (&json!("ERROR"), &json!(["start", "terminate"])), "{stage}");
        assert_eq!((&pod["runtime"], &pod["ssh"]["direct"]), (&Value::Null, &Value::Null));
        // It holds its GPU, so it is charged.
        let before = world.inner_pod(&id).await["accrued_usd"].as_f64().expect("a number");
        world.advance(3600.0).await;
        let after = world.inner_pod(&id).await["accrued_usd"].as_f64().expect("a number");
        assert!(after - before > 0.24 && pod["cost"] == 0.25, "{before} {after}");
        // The next start has nothing of it.
        assert_eq!(world.act(&id, "start").await.0, 200);
        assert_eq!(world.come_up(&id).await["status"], "RUNNING");
        world.fault(json!({ "operation": "podAction", "kind": "error_state", "stage": stage })).await;
        assert_eq!(world.act(&id, "stop").await.0, 200, "which is no start, so the fault waits");
        assert_eq!(world.act(&id, "start").await.0, 200);
        assert_eq!(world.come_up(&id).await["status"], "ERROR");
        up_to += lasts;
    }
    world.finish().await;
}

#[tokio::test]
async fn a_start_changes_gpu_address_and_port() {
    let world = Tested::new().await;
    let id = world.create("comfy").await;
    let first = world.come_up(&id).await;
    world.act(&id, "stop").await;
    world.fault(json!({ "operation": "podAction", "kind": "changed_gpu", "gpu": "NVIDIA L4" })).await;
    assert_eq!(world.act(&id, "start").await.0, 200);
    let second = world.come_up(&id).await;
    assert_eq!((&first["gpu"]["id"], &second["gpu"]["id"]), (&json!("NVIDIA RTX A4000"), &json!("NVIDIA L4")));
    assert_eq!((&first["cost"], &second["cost"]), (&json!(0.25), &json!(0.43)));
    assert_eq!(second["ssh"]["direct"]["host"], "127.0.0.1");

    world.act(&id, "stop").await;
    world.fault(json!({ "operation": "podAction", "kind": "changed_address" })).await;
    assert_eq!(world.act(&id, "start").await.0, 200);
    let third = world.come_up(&id).await;
    assert_eq!(
        (&third["ssh"]["direct"]["host"], &third["runtime"]["ports"][0]["ip"]),
        (&json!("127.0.0.2"), &json!("127.0.0.2"))
    );
    let port = third["ssh"]["direct"]["port"].as_u64().expect("a port") as u16;
    assert_ne!(second["ssh"]["direct"]["port"], third["ssh"]["direct"]["port"]);
    let knock = async |host: &str| tokio::net::TcpStream::connect((host, port)).await.is_ok();
    assert_eq!((knock("127.0.0.1").await, knock("127.0.0.2").await), (false, true));
    world.finish().await;
}

#[tokio::test]
async fn a_pod_costs_something_else_and_the_answer_may_be_lost_too() {
    let world = Tested::new().await;
    world.fault(json!({ "operation": "createPod", "kind": "price", "cost": 3.5 })).await;
    world.fault(json!({ "operation": "createPod", "kind": "status_after", "status": 504 })).await;
    assert_eq!(world.post("/v2/pods", pod_body("dear")).await.0, 504);
    let pod = world.list().await.remove(0);
    assert_eq!(pod["cost"], 3.5);
    world.advance(3600.0).await;
    let inner = world.inner_pod(pod["id"].as_str().expect("an id")).await;
    assert!((inner["accrued_gpu_usd"].as_f64().expect("a number") - 3.5).abs() < 1e-6, "{inner}");

    // What is not done can't have befallen a pod: the second fault waits for the next create.
    world.fault(json!({ "operation": "createPod", "kind": "price" })).await;
    world.fault(json!({ "operation": "createPod", "kind": "status_before" })).await;
    assert_eq!(world.post("/v2/pods", pod_body("never")).await.0, 500);
    let (_, pod) = world.post("/v2/pods", pod_body("twice")).await;
    assert_eq!(pod["cost"], 0.5);
    world.finish().await;
}
