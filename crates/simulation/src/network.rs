//! Messages to the control plane: from hosts, from compute processes, from people. All know one address, which leads to
//! the server that should have the tenant. A request or its answer may be late or lost; a server that ends answers
//! nothing; when the address leads to another server, connections to the former one break.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use varve_api::Refusal;
use varve_control::Error;

use crate::door::Plane;
use crate::judge;
use crate::kinds::Kind;
use crate::world::World;

/// How long a message is on its way at most, when nothing is slow.
const WAY_MAX: Duration = Duration::from_millis(4);
/// How long it takes to notice that nobody answers.
const NOBODY: Duration = Duration::from_millis(60);
/// Messages of a thousand that are lost.
const LOST_PER_MILLE: u32 = 8;

/// What a call is, for counting.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// What a crash of the server during it counts as.
    pub crash: Option<Kind>,
    /// What a lost message of it counts as.
    pub lost: Kind,
    /// How long each message takes at most beyond what is usual.
    pub slow: Duration,
}

/// A call of which nothing is special.
pub const PLAIN: About = About { crash: None, lost: Kind::MessageLost, slow: Duration::ZERO };

fn away() -> Refusal {
    Refusal::unavailable("no answer")
}

/// Asks the control plane. The server does what was asked to its end, though nobody hears of it.
///
/// # Errors
/// What the control plane says; *unavailable* when there is no answer.
pub async fn call<T, F>(world: &Arc<World>, about: About, work: impl FnOnce(Arc<Plane>) -> F + Send) -> Result<T, Refusal>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Error>> + Send + 'static,
{
    world.pause(WAY_MAX + about.slow).await;
    let Some((node, plane)) = world.active_node().and_then(|node| Some((node.clone(), node.plane()?))) else {
        world.pause(NOBODY).await;
        return Err(away());
    };
    if loses(world, about) {
        return Err(away());
    }
    let under_way = about.crash.map(|kind| world.under_way(node.machine(), kind));
    let (done, is_done) = oneshot::channel::<Result<T, Refusal>>();
    let (work, judged) = (work(plane), (world.clone(), Arc::downgrade(&node)));
    node.spawn(async move {
        let _under_way = under_way;
        let (world, node) = judged;
        let result = match work.await {
            Ok(answer) => Ok(answer),
            Err(error) => {
                if let Some(node) = node.upgrade() {
                    judge::control_error(&world, &node, &error).await;
                }
                Err(error.refusal())
            }
        };
        let _nobody_waits = done.send(result);
    });
    let machine = node.machine();
    drop(node);
    let answer = tokio::select! {
        biased;
        answer = is_done => answer.unwrap_or_else(|_| Err(away())),
        () = world.address_leaves(machine) => Err(away()),
    };
    world.pause(WAY_MAX + about.slow).await;
    if loses(world, about) { Err(away()) } else { answer }
}

fn loses(world: &World, about: About) -> bool {
    let loses = !world.is_calm() && world.chance(LOST_PER_MILLE);
    if loses {
        world.counts.add(about.lost);
    }
    loses
}
