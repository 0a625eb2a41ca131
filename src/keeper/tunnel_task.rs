use super::Keeper;
use std::sync::Arc;
pub(super) async fn hold(_k: Arc<Keeper>, _n: String, _i: String) {}
