//! Days of the Gregorian calendar: audits expire and advisories grow old by the day.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

const DAY_SEC: u64 = 86_400;

/// A day, counted from 1970-01-01.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Date(i64);

impl Date {
    /// Parses YYYY-MM-DD, years 1970 to 9999.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        let digits = |range: std::ops::Range<usize>| {
            let part = text.get(range)?;
            if part.bytes().all(|c| c.is_ascii_digit()) { part.parse::<i64>().ok() } else { None }
        };
        if bytes.len() != 10 || bytes[4] != b'-' || bytes[7] != b'-' {
            return None;
        }
        let (year, month, day) = (digits(0..4)?, digits(5..7)?, digits(8..10)?);
        if year < 1970 || !(1..=12).contains(&month) || day < 1 {
            return None;
        }
        let date = Self::from_civil(year, month, day);
        // A day that the month does not have comes back as one of the next month.
        (date.civil() == (year, month, day)).then_some(date)
    }

    /// The day of the system clock, in UTC.
    pub fn today() -> Self {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        Self::from_unix_sec(seconds)
    }

    /// The day of a Unix time.
    pub fn from_unix_sec(seconds: u64) -> Self {
        Self((seconds / DAY_SEC) as i64)
    }

    /// Whole days from `earlier` to this one, negative if it is later.
    pub fn days_since(self, earlier: Self) -> i64 {
        self.0 - earlier.0
    }

    /// Days from 1970-01-01 of a civil date: eras of 400 years, years that begin in March.
    fn from_civil(year: i64, month: i64, day: i64) -> Self {
        let year = if month <= 2 { year - 1 } else { year };
        let era = year / 400;
        let year_of_era = year % 400;
        let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        Self(era * 146_097 + day_of_era - 719_468)
    }

    fn civil(self) -> (i64, i64, i64) {
        let days = self.0 + 719_468;
        let era = days / 146_097;
        let day_of_era = days % 146_097;
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted = (5 * day_of_year + 2) / 153;
        let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        (year, month, day_of_year - (153 * shifted + 2) / 5 + 1)
    }
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = self.civil();
        write!(f, "{year:04}-{month:02}-{day:02}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calendar() {
        assert_eq!(Date::parse("1970-01-01"), Some(Date(0)));
        assert_eq!(Date::parse("2000-03-01"), Some(Date(11_017)));
        assert_eq!(Date::parse("2024-02-29").map(|date| date.to_string()), Some("2024-02-29".into()));
        for wrong in
            ["2023-02-29", "2024-13-01", "2024-00-10", "2024-1-1", "24-01-01", "2024-04-31", "2024/01/01"]
        {
            assert_eq!(Date::parse(wrong), None, "{wrong}");
        }
        assert_eq!(Date::from_unix_sec(951_868_799).to_string(), "2000-02-29");
        for days in (0..60_000).step_by(17) {
            let date = Date(days);
            assert_eq!(Date::parse(&date.to_string()), Some(date));
        }
    }
}
