//! tonic's own server with nothing around it: `Place` checked and answered as order-service does,
//! without a store, metrics, limits or request ids, on the same allocator. `bare_tonic ADDRESS`

use mimalloc::MiMalloc;
use order_service::{
    order::{Expected, Order, Quantity},
    proto::{
        self, GetRequest, GetResponse, ListRequest, ListResponse, PlaceRequest, PlaceResponse,
        order_service_server::{OrderService, OrderServiceServer},
    },
};
use tonic::{Request, Response, Status, transport::Server};

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).unwrap_or_default().parse()?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let service = OrderServiceServer::new(Bare);
        Ok(Server::builder().add_service(service).serve(address).await?)
    })
}

struct Bare;

fn invalid(Expected(what): Expected) -> Status {
    Status::invalid_argument(format!("expected {what}"))
}

#[tonic::async_trait]
impl OrderService for Bare {
    async fn place(
        &self,
        request: Request<PlaceRequest>,
    ) -> Result<Response<PlaceResponse>, Status> {
        let PlaceRequest { product_id, quantity, .. } = request.get_ref();
        let product_id = product_id.parse().map_err(invalid)?;
        let quantity = Quantity::try_from(u64::from(quantity.unwrap_or(1))).map_err(invalid)?;
        let order = proto::Order::from(Order::new(product_id, quantity));
        Ok(Response::new(PlaceResponse { order: Some(order), replayed: false }))
    }

    async fn get(&self, _: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        Err(Status::not_found("nothing is stored"))
    }

    async fn list(&self, _: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        Err(Status::unimplemented("nothing is stored"))
    }
}
