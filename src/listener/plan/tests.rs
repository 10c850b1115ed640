use super::*;
use crate::listener::{KEEP_ALIVE, MAX_STREAMS, OVERTIME};

/// What a connection may do whose age is its only limit, if it has one.
fn limits(max_age: Option<Duration>) -> Limits {
    Limits {
        max_connections: 1,
        evicts_idle: false,
        read_timeout: Duration::from_secs(1000),
        max_age,
        overtime: OVERTIME,
        max_idle: None,
        keep_alive: KEEP_ALIVE,
        max_streams: MAX_STREAMS,
    }
}

fn plan(max_idle: Option<Duration>) -> (Plan, Arc<State>) {
    let state = Arc::new(State::new());
    (Plan::new(Limits { max_idle, ..limits(None) }, state.clone()), state)
}

#[test]
fn an_old_connection_with_nothing_due_is_let_alone() {
    let (mut plan, state) = plan(None);
    drop(state.request_came(true, Ending::default()));
    plan.begun -= Duration::from_secs(2 * 86_400);
    assert_eq!(plan.turn_ended(), None);
    assert!(matches!(plan.act(), Act::Nothing));
}

#[test]
fn a_head_counts_from_the_turn_that_brought_its_first_byte() {
    let (plan, state) = plan(None);
    drop(state.request_came(true, Ending::default()));
    state.bytes_came(b"G");
    let due = plan.turn_ended().unwrap();
    assert!(due > Instant::now());
    state.bytes_came(b"E");
    assert_eq!(plan.turn_ended(), Some(due));
    // It came whole.
    let _in_flight = state.request_came(true, Ending::default());
    assert_eq!(plan.turn_ended(), None);
}

#[test]
fn idle_is_who_has_no_request_left_and_from_the_end_of_that_turn() {
    let hour = Duration::from_secs(3600);
    let (mut plan, state) = plan(Some(hour));
    let requests = [(); 2].map(|()| state.request_came(false, Ending::default()));
    let [first, second] = requests;
    drop(first);
    assert_eq!(plan.turn_ended(), None);
    drop(second);
    assert!(plan.turn_ended().unwrap() > Instant::now() + hour - Duration::from_secs(60));
    // What comes and goes within a turn begins it anew.
    let before = plan.turn_ended();
    drop(state.request_came(false, Ending::default()));
    assert!(plan.turn_ended() > before);
    // With the end of all the time for last words begins where a request ended late.
    plan.follow(Phase::Stopping);
    plan.stopping_since -= hour;
    (plan.leave, plan.leave_busy) = (None, None);
    let last = state.request_came(false, Ending::default());
    assert_eq!(plan.turn_ended(), None);
    drop(last);
    assert!(plan.turn_ended().is_some_and(|due| due > Instant::now()));
}

#[test]
fn who_may_be_idle_for_good_ends_after_the_last_words() {
    let (mut plan, state) = plan(None);
    drop(state.request_came(false, Ending::default()));
    assert_eq!(plan.turn_ended(), None);
    plan.follow(Phase::Stopping);
    (plan.leave, plan.leave_busy) = (None, None);
    let due = plan.turn_ended().unwrap();
    assert!(due > Instant::now() && due <= Instant::now() + LAST_WORDS);
    assert_eq!(plan.turn_ended(), Some(due));
    plan.stopping_since -= LAST_WORDS;
    state.now().idle_since = Since::At(plan.stopping_since);
    assert!(matches!(plan.act(), Act::Close));
}

#[test]
fn ages_are_within_ten_percent_and_all_over_that_range() {
    let age = Duration::from_secs(100);
    let ages: Vec<_> = (0..1000)
        .map(|_| {
            let plan = Plan::new(limits(Some(age)), Arc::new(State::new()));
            (plan.turn_ended().unwrap() - plan.begun).as_secs_f64()
        })
        .collect();
    assert!(ages.iter().all(|age| (90.0..=110.0).contains(age)), "{ages:?}");
    for tenth in 0..10 {
        let from = 90.0 + 2.0 * f64::from(tenth);
        assert!(ages.iter().any(|age| (from..from + 2.0).contains(age)), "{from}");
    }
}
