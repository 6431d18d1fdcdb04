//! How much of a machine a compute may take, as a person writes it: `--cpu 0.25..2 --memory 256MB..2GB`.

use clap::Args;
use varve_api::size::{Between, Size};

/// The size of a compute.
#[derive(Debug, Default, Args)]
pub(crate) struct SizeArgs {
    /// Processors: the least and the most, such as 0.25..2, or one number for both. In between the limit follows the
    /// load.
    #[arg(long, value_parser = processors)]
    pub(crate) cpu: Option<Between>,
    /// Memory: the least and the most, such as 256MB..2GB, or one figure for both. Postgres's own cache is set for the
    /// least.
    #[arg(long, value_parser = memory)]
    pub(crate) memory: Option<Between>,
}

impl SizeArgs {
    pub(crate) fn size(&self) -> Size {
        Size { cpu_milli: self.cpu, memory_bytes: self.memory }
    }
}

/// A range of which `part` reads each end, and which a compute may have.
fn between(text: &str, part: fn(&str) -> Option<u64>, example: &str, of: fn(Between) -> Size) -> Result<Between, String> {
    let (min, max) = text.split_once("..").unwrap_or((text, text));
    let read = |text: &str| part(text.trim()).ok_or_else(|| format!("'{text}' cannot be read: write {example}"));
    let between = Between { min: read(min)?, max: read(max)? };
    of(between).check().map_err(|error| error.to_string())?;
    Ok(between)
}

fn processors(text: &str) -> Result<Between, String> {
    let part = |text: &str| {
        let number: f64 = text.parse().ok().filter(|number: &f64| number.is_finite() && (0.0..1e6).contains(number))?;
        Some((number * 1000.0).round() as u64)
    };
    between(text, part, "a number of processors, such as 2 or 0.25..2", |cpu| Size { cpu_milli: Some(cpu), ..Size::default() })
}

/// Bytes as Postgres writes them; without a unit nobody knows what is meant.
pub(crate) fn bytes_of(text: &str) -> Option<u64> {
    let at = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let unit: u64 = match unit.trim() {
        "kB" | "KB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        "TB" => 1 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

fn memory(text: &str) -> Result<Between, String> {
    between(text, bytes_of, "a number with its unit, such as 512MB or 256MB..2GB", |memory| Size {
        memory_bytes: Some(memory),
        ..Size::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_what_cannot_be_is_refused_in_words() {
        let range = |min, max| Ok(Between { min, max });
        assert_eq!(processors("0.25..2"), range(250, 2000));
        assert_eq!(processors("1.5"), range(1500, 1500));
        assert_eq!(memory("256MB..2GB"), range(256 << 20, 2 << 30));
        assert_eq!(memory("512 MB"), range(512 << 20, 512 << 20));
        for text in ["", "..", "1..", "x", "-1", "NaN", "inf", "2..0.25", "0", "0..1", "1e9", "1..2..3"] {
            assert!(processors(text).is_err(), "{text}");
        }
        for text in ["", "256", "256mb", "2GB..256MB", "0MB..1GB", "1MB", "99999999999999999999GB", "1.5GB", "9999999TB"] {
            assert!(memory(text).is_err(), "{text}");
        }
        assert!(memory("256").unwrap_err().contains("with its unit"));
        assert!(processors("2..0.25").unwrap_err().contains("more than the most"));
    }
}
