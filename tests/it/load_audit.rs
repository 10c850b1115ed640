//! `order-load --audit` through what it must survive: a server killed and restarted, replicas that
//! come and go.

use std::time::Duration;

use rustix::process::Signal;

use crate::{
    load::{Loading, PROTOCOLS},
    postgres::PostgresServer,
    support::{Page, Process, scrape_until},
    traffic::Balancer,
};

fn placed(page: &Page) -> f64 {
    page.value("product_order_total", &[])
}

#[tokio::test]
async fn kill_9_and_a_restart_in_the_middle_lose_and_double_no_order() {
    for protocol in PROTOCOLS {
        let dir = tempfile::tempdir().unwrap();
        // Orders are in flight at any moment.
        let delay = ["--processing-delay", "50ms"];
        let first = Process::start_in(dir.path(), &delay).await;
        let address = first.api.to_string();
        let target = format!("http://{address}");
        let args = ["--target", &target, "--protocol", protocol, "--phases", "5s@100", "--audit"];
        let loading = Loading::start(&args);
        scrape_until(first.admin, |page| placed(page) >= 100.0).await;
        first.kill_9().await;
        let again = [&["--listen", &address][..], &delay].concat();
        let second = Process::start_in(dir.path(), &again).await;
        let loaded = loading.ended().await;
        assert_eq!(loaded.audited_well(), 500);
        assert!(loaded.phase(0)["retried"].as_u64().unwrap() > 0, "{loaded:#?}");
        assert_eq!(loaded.phase(0)["served_by"].as_object().unwrap().len(), 2);
        assert!(placed(&second.scrape().await) < 500.0);
    }
}

#[tokio::test]
async fn an_outage_longer_than_the_time_limit_costs_an_audited_run_no_order() {
    for protocol in PROTOCOLS {
        let dir = tempfile::tempdir().unwrap();
        let first = Process::start_in(dir.path(), &[]).await;
        let address = first.api.to_string();
        let target = format!("http://{address}");
        // What falls due meanwhile is more than the connections take at once.
        let args = ["--phases", "6s@50", "--timeout", "2s", "--connections", "1", "--audit"];
        let args = [&["--target", &target, "--protocol", protocol], &args[..]].concat();
        let loading = Loading::start(&args);
        scrape_until(first.admin, |page| placed(page) >= 20.0).await;
        first.kill_9().await;
        // The length of the outage.
        tokio::time::sleep(Duration::from_secs(4)).await;
        let _second = Process::start_in(dir.path(), &["--listen", &address]).await;
        assert_eq!(loading.ended().await.audited_well(), 300);
    }
}

#[tokio::test]
async fn an_audit_of_a_service_that_stays_away_ends_and_knows_nothing() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let target = server.url("");
    // To wait for each of the orders, 64 at a time, would take longer than this test may.
    let phases = ["--phases", "2s@1000,1h@0", "--patience", "3s", "--audit"];
    let loading = Loading::start(&[&["--target", &target], &phases[..]].concat());
    scrape_until(server.admin, |page| placed(page) >= 1900.0).await;
    server.kill_9().await;
    loading.signal(Signal::INT);
    let loaded = loading.ended().await;
    assert_eq!(loaded.code, Some(1), "{loaded:#?}");
    let audit = &loaded.document["audit"];
    let acknowledged = audit["acknowledged"].as_u64().unwrap();
    assert!(acknowledged >= 1900, "{audit:#?}");
    // Each order, and the list.
    assert_eq!(audit["unread"], acknowledged + 1, "{audit:#?}");
    assert_eq!((&audit["lost"], &audit["doubled"]), (&0.into(), &0.into()), "{audit:#?}");
}

#[tokio::test]
#[ignore = "needs PostgreSQL; run by make test"]
async fn twenty_rounds_of_new_for_old_lose_double_and_fail_no_order() {
    let database = PostgresServer::start().await;
    let start = async || {
        let args = ["--drain-delay", "500ms", "--max-connection-age", "2s"];
        Process::start(&database.url(), &args).await
    };
    let balancer = Balancer::start().await;
    let mut old = start().await;
    balancer.add(old.api);
    let target = format!("http://{}", balancer.address);
    let runs = PROTOCOLS.map(|protocol| {
        // Ended by a signal once the rounds are over.
        let args = ["--target", &target, "--protocol", protocol, "--phases", "1h@50", "--audit"];
        Loading::start(&args)
    });
    for _ in 0..20 {
        let new = start().await;
        balancer.add(new.api);
        let before = placed(&old.scrape().await);
        scrape_until(old.admin, |page| placed(page) >= before + 10.0).await;
        // As on Kubernetes: the signal first, and the balancer learns of it a little later.
        old.signal(Signal::TERM);
        old.logged("draining: no longer ready").await;
        balancer.remove(old.api);
        assert_eq!(old.exited().await.code(), Some(0));
        old = new;
        scrape_until(old.admin, |page| placed(page) >= 10.0).await;
    }
    let mut acknowledged = 0;
    for loading in runs {
        loading.signal(Signal::INT);
        let loaded = loading.ended().await;
        acknowledged += loaded.audited_well();
        let processes = loaded.phase(0)["served_by"].as_object().unwrap().len();
        assert_eq!(processes, 21, "{loaded:#?}");
    }
    assert!(acknowledged >= 20 * 20, "{acknowledged}");
    // The audits end before the last server does.
    assert_eq!(tokio::time::timeout(Duration::from_secs(60), old.terminate()).await, Ok(Some(0)));
}
