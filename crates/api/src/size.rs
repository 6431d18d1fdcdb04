//! How much of a machine a compute may take.
//!
//! A size has the least and the most of processors and of memory. What Postgres cannot change while it runs is set for
//! the least; between the two the limit follows the load.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Least processors of a compute, in thousandths.
pub const CPU_MILLI_MIN: u64 = 50;
/// Least memory of a compute: with less, Postgres does not start in good order.
pub const MEMORY_BYTES_MIN: u64 = 128 << 20;
/// More than any machine has, of both.
const CPU_MILLI_MAX: u64 = 1 << 30;
const MEMORY_BYTES_MAX: u64 = 1 << 50;

/// The least and the most of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Between {
    /// The least.
    pub min: u64,
    /// The most.
    pub max: u64,
}

/// How much of a machine a compute may take. What is left out is as its host has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// Thousandths of a processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_milli: Option<Between>,
    /// Bytes of memory, with what the kernel caches for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<Between>,
}

/// What a running compute may take right now, somewhere between the least and the most of its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CurrentLimits {
    /// Thousandths of a processor; none: what there is.
    pub cpu_milli: Option<u64>,
    /// Bytes of memory; none: what there is.
    pub memory_bytes: Option<u64>,
}

/// The most that a host gives to one compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Thousandths of a processor.
    pub cpu_milli: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
}

/// A size that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct SizeError {
    /// Which part of it: `cpu_milli` or `memory_bytes`.
    pub part: &'static str,
    /// Why.
    pub problem: String,
}

impl Size {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        *self == Size::default()
    }

    /// This size, and of what it leaves out that of `other`.
    #[must_use]
    pub fn or(self, other: Size) -> Size {
        Size { cpu_milli: self.cpu_milli.or(other.cpu_milli), memory_bytes: self.memory_bytes.or(other.memory_bytes) }
    }

    /// Whether it makes sense on some machine.
    ///
    /// # Errors
    /// [`SizeError`] says which part does not, and why.
    pub fn check(&self) -> Result<(), SizeError> {
        let parts = [
            ("cpu_milli", self.cpu_milli, CPU_MILLI_MIN, CPU_MILLI_MAX, processors as fn(u64) -> String),
            ("memory_bytes", self.memory_bytes, MEMORY_BYTES_MIN, MEMORY_BYTES_MAX, bytes),
        ];
        for (part, between, least, most, words) in parts {
            let Some(Between { min, max }) = between else { continue };
            let problem = if min > max {
                format!("the least ({}) is more than the most ({})", words(min), words(max))
            } else if min < least {
                format!("{} is too little: a compute needs {} at least", words(min), words(least))
            } else if max > most {
                format!("{} is more than any machine has", words(max))
            } else {
                continue;
            };
            return Err(SizeError { part, problem });
        }
        Ok(())
    }

    /// Whether a host with this capacity can give it.
    ///
    /// # Errors
    /// [`SizeError`] says what is too much.
    pub fn fits(&self, capacity: &Capacity) -> Result<(), SizeError> {
        let too_much = |part, asked: String, given: String| SizeError {
            part,
            problem: format!("{asked} is more than the host gives to a compute: {given} at most"),
        };
        match (self.cpu_milli, self.memory_bytes) {
            (Some(cpu), _) if cpu.max > capacity.cpu_milli => {
                Err(too_much("cpu_milli", processors(cpu.max), processors(capacity.cpu_milli)))
            }
            (_, Some(memory)) if memory.max > capacity.memory_bytes => {
                Err(too_much("memory_bytes", bytes(memory.max), bytes(capacity.memory_bytes)))
            }
            _ => Ok(()),
        }
    }
}

/// Thousandths of a processor, as a person says them.
pub fn processors(milli: u64) -> String {
    let text = format!("{}.{:03}", milli / 1000, milli % 1000);
    let text = text.trim_end_matches('0').trim_end_matches('.');
    format!("{text} {}", if milli == 1000 { "processor" } else { "processors" })
}

/// Bytes, as a person says them: in GB where they are whole, else in MB of 1,024 times 1,024 bytes.
pub fn bytes(bytes: u64) -> String {
    match bytes {
        _ if bytes > 0 && bytes.is_multiple_of(1 << 30) => format!("{} GB", bytes >> 30),
        _ => format!("{} MB", bytes >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_refused_in_words() {
        let cpu = |min, max| Size { cpu_milli: Some(Between { min, max }), memory_bytes: None };
        let memory = |min: u64, max: u64| Size { cpu_milli: None, memory_bytes: Some(Between { min: min << 20, max: max << 20 }) };
        for (size, said) in [
            (cpu(2000, 250), "the least (2 processors) is more than the most (0.25 processors)"),
            (cpu(0, 1000), "0 processors is too little: a compute needs 0.05 processors at least"),
            (cpu(1000, u64::MAX), "more than any machine has"),
            (memory(2048, 256), "the least (2 GB) is more than the most (256 MB)"),
            (memory(0, 256), "0 MB is too little: a compute needs 128 MB at least"),
        ] {
            let error = size.check().unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        assert_eq!(cpu(250, 2000).or(memory(256, 2048)).check(), Ok(()));
        let capacity = Capacity { cpu_milli: 2000, memory_bytes: 4 << 30 };
        assert_eq!(cpu(250, 2000).or(memory(256, 4096)).fits(&capacity), Ok(()));
        let error = cpu(250, 2500).fits(&capacity).unwrap_err();
        assert_eq!(error.to_string(), "2.5 processors is more than the host gives to a compute: 2 processors at most");
        assert_eq!(memory(256, 5000).fits(&capacity).unwrap_err().part, "memory_bytes");
    }
}
