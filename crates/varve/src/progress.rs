//! Long work shows that it goes on, on a terminal.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A spinner whose words `work` changes as it goes on; nothing where standard error is no terminal.
pub(crate) async fn spinner_that_tells<T, F: Future<Output = T>>(work: impl FnOnce(Box<dyn Fn(String)>) -> F) -> T {
    if !std::io::stderr().is_terminal() {
        return work(Box::new(|_| ())).await;
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    let told = bar.clone();
    let done = work(Box::new(move |words| told.set_message(words))).await;
    bar.finish_and_clear();
    done
}

/// A spinner with the elapsed time on standard error, while `work` runs longer than a moment; nothing where that is no
/// terminal.
pub(crate) async fn spinner<T>(what: &str, work: impl Future<Output = T>) -> T {
    if !std::io::stderr().is_terminal() {
        return work.await;
    }
    tokio::pin!(work);
    if let Ok(done) = tokio::time::timeout(Duration::from_millis(300), &mut work).await {
        return done;
    }
    let bar = ProgressBar::new_spinner().with_message(what.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    let done = work.await;
    bar.finish_and_clear();
    done
}
