//! A process is not taken for gone because we are out of descriptors. Alone in its binary: it takes all descriptors
//! away for a while.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use varve_host::identity::ProcessId;

#[tokio::test]
async fn out_of_descriptors_is_not_gone() {
    let id = ProcessId::of(std::process::id()).unwrap().unwrap();
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(0), maximum: before.maximum }).unwrap();
    let (runs, held, of) = (id.runs(), id.hold(), ProcessId::of(id.pid));
    setrlimit(Resource::Nofile, before).unwrap();
    for kind in [runs.map(drop).unwrap_err(), held.map(drop).unwrap_err(), of.map(drop).unwrap_err()] {
        assert_eq!(kind.raw_os_error(), Some(rustix::io::Errno::MFILE.raw_os_error()), "{kind}");
    }
    assert!(id.runs().unwrap() && id.hold().unwrap().is_some());
}
