//! All of order-service but its sockets, with its store in memory. A type of its own, not a side: one
//! more use of the layer would change how the compiler inlines it where it is compared.

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use order_service::{
    api::{self, Api, Extra},
    config::{Migrations, Settings},
    layers::{InFlight, ServedBy},
    metrics::Metrics,
    store::{Store, StoreHealth, Writers},
};
use tower::Service as _;

/// The service, ready to be called.
pub struct Whole {
    api: Api,
    _writers: Writers,
}

impl Whole {
    pub async fn new() -> Self {
        const VALID: &str = "nothing here depends on the machine";
        let args = ["order-service", "--database-url", "sqlite::memory:"];
        let settings = Settings::read(args.map(Into::into)).expect(VALID);
        let metrics = Metrics::new("0", "0").expect(VALID);
        let url = settings.database_url.clone();
        let opened =
            Store::open(url, 1, Migrations::Apply, metrics.store.clone(), StoreHealth::new()).await;
        let (store, writers) = opened.expect(VALID);
        let in_flight = InFlight::new(settings.max_in_flight);
        let served_by = ServedBy::new("bench", 1);
        let api = api::build(&settings, store, in_flight, served_by, &metrics, Extra::default());
        Self { api: api.expect(VALID), _writers: writers }
    }

    /// One order, its response read to its end.
    pub async fn call(&mut self, request: Request<Full<Bytes>>) {
        super::read(self.api.service.call(request).await).await;
    }
}
