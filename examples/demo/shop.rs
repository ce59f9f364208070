//! The application: a shop whose customers place orders, pay, and receive their goods.

use serde_json::{Value, json};

const COUNTRIES: [&str; 5] = ["BE", "DE", "FR", "IE", "NL"];

/// Generates the same events in every run.
#[derive(Debug, Default)]
pub struct Shop {
    generated: usize,
}

impl Shop {
    /// The next event: every order is placed, later paid, later shipped.
    pub fn next(&mut self) -> Value {
        let number = self.generated;
        self.generated += 1;
        let order = |number: usize| format!("order-{}", number / 3);
        match number % 3 {
            0 => json!({
                "stream_id": order(number),
                "event_type": "OrderPlaced",
                "payload": {
                    "customer": format!("customer-{}", number * 7 % 211),
                    "country": COUNTRIES[number / 3 % COUNTRIES.len()],
                    "cents": 100 + number * 37 % 9_900,
                },
            }),
            1 => json!({ "stream_id": order(number), "event_type": "OrderPaid", "payload": {} }),
            _ => json!({
                "stream_id": order(number),
                "event_type": "OrderShipped",
                "payload": { "carrier": "post" },
            }),
        }
    }

    /// The next `count` events, one per line.
    pub fn lines(&mut self, count: usize) -> Vec<u8> {
        (0..count).flat_map(|_| format!("{}\n", self.next()).into_bytes()).collect()
    }
}

/// An order without an amount, on which the revenue projector of release 1 breaks.
pub fn without_amount() -> Value {
    json!({
        "stream_id": "order-by-phone",
        "event_type": "OrderPlaced",
        "payload": { "customer": "customer-7", "country": "NL" },
    })
}
