//! More peers than there are file descriptors.

use std::time::Duration;

use tokio::time::timeout;

use crate::{
    peers::connect,
    support::{Process, run_as, scrape_until},
};

#[tokio::test]
async fn more_peers_than_file_descriptors_leave_the_admin_port_what_it_needs() {
    let few = "ulimit -n 256 && exec \"$0\" \"$@\"";
    let few = |command: &mut _| {
        run_as(command, &["sh", "-c", few, env!("CARGO_BIN_EXE_order-service")]);
    };
    let server = Process::start_command("sqlite::memory:", &[], few).await;
    let mut peers = Vec::new();
    for _ in 0..300 {
        peers.push(connect(server.api).await);
    }
    let warned = server.log().into_iter().filter(|line| line["open_files"] == 256);
    assert_eq!(warned.count(), 1, "{:?}", server.log());
    let open = || std::fs::read_dir(format!("/proc/{}/fd", server.id())).unwrap().count();
    let client = reqwest::Client::new();
    // As often as a kubelet and Prometheus ask, in less time: 5 s and the peers are still there.
    for _ in 0..10 {
        for path in ["livez", "readyz", "metrics"] {
            // Each on a connection of its own, as a probe is.
            let request = client.get(format!("http://{}/{path}", server.admin));
            let answer = request.header("connection", "close").send();
            let answer = timeout(Duration::from_secs(2), answer).await;
            let answer = answer.unwrap_or_else(|_| panic!("/{path}: no answer, {} open", open()));
            assert_eq!(answer.unwrap().status(), 200, "/{path}");
        }
    }
    // Once the peers are gone, whoever waits is served.
    drop(peers);
    scrape_until(server.admin, |page| page.value("connections_open", &[]) == 0.0).await;
    let answer = reqwest::get(server.url("/product")).await.unwrap();
    assert_eq!(answer.text().await.unwrap(), "Order placed!");
}
