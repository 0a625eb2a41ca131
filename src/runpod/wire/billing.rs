//! What was charged, as the provider's books tell it.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Page, Pagination};
use crate::provider::PodBill;

/// Far more than anybody is charged; beyond it sums would lose their cents.
const MOST_USD: f64 = 1e9;

#[derive(Deserialize)]
pub(in super::super) struct BillPage {
    records: Vec<BillRecord>,
    pagination: Option<Pagination>,
}

/// One pod in one hour.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in super::super) struct BillRecord {
    pod_id: String,
    total_amount: f64,
    gpu_amount: Option<f64>,
    disk_amount: Option<f64>,
}

impl Page for BillPage {
    type Item = BillRecord;

    fn into_parts(self) -> (Vec<BillRecord>, Option<Pagination>) {
        (self.records, self.pagination)
    }

    fn id(_: &BillRecord) -> Option<&str> {
        None
    }
}

/// The records of each pod as one sum.
pub(in super::super) fn bills(records: Vec<BillRecord>) -> Vec<PodBill> {
    let mut bills: BTreeMap<String, PodBill> = BTreeMap::new();
    for record in records {
        let bill = bills.entry(record.pod_id).or_insert_with_key(|id| PodBill {
            pod_id: id.clone(),
            total_usd: 0.0,
            gpu_usd: 0.0,
            disk_usd: 0.0,
        });
        add(&mut bill.total_usd, Some(record.total_amount));
        add(&mut bill.gpu_usd, record.gpu_amount);
        add(&mut bill.disk_usd, record.disk_amount);
    }
    bills.into_values().collect()
}

fn add(sum: &mut f64, amount: Option<f64>) {
    *sum = (*sum + amount.unwrap_or_default()).clamp(-MOST_USD, MOST_USD);
}
