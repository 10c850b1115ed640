//! tonic's own server with nothing around it: `Place` checked and answered as order-service does,
//! without a store, metrics, limits or request ids, on the same allocator. `bare_tonic ADDRESS`

use mimalloc::MiMalloc;
use order_service::proto::{
    GetRequest, GetResponse, ListRequest, ListResponse, PlaceRequest, PlaceResponse,
    order_service_server::{OrderService, OrderServiceServer},
};
use peers::answer::place;
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

#[tonic::async_trait]
impl OrderService for Bare {
    async fn place(
        &self,
        request: Request<PlaceRequest>,
    ) -> Result<Response<PlaceResponse>, Status> {
        Ok(Response::new(place(request.get_ref())?))
    }

    async fn get(&self, _: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        Err(Status::not_found("nothing is stored"))
    }

    async fn list(&self, _: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        Err(Status::unimplemented("nothing is stored"))
    }
}
