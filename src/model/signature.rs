//! The signature of a message: HMAC-SHA256. The key is stored in the database, beside the log's id.

use std::fmt;

use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};

/// The length of a key: that of the hash, as RFC 2104 recommends.
pub(crate) const KEY_BYTES: usize = 32;

/// The length of a signature, in hexadecimal digits.
pub(crate) const SIGNATURE_DIGITS: usize = 64;

/// The id of a log, and the key that signs the log's messages.
#[derive(Debug, Clone)]
pub(crate) struct LogIdentity {
    /// Part of every message.
    pub(crate) id: String,
    /// Never leaves the process.
    pub(crate) key: SigningKey,
}

/// A key that signs messages. Its holder can forge messages, so `Debug` does not print it.
#[derive(Clone)]
pub(crate) struct SigningKey(hmac::Key);

impl SigningKey {
    pub(crate) fn new(key: &[u8]) -> Self {
        SigningKey(hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    /// The signature of a text, in lower-case hexadecimal digits.
    pub(crate) fn sign(&self, text: &str) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let tag = hmac::sign(&self.0, text.as_bytes());
        tag.as_ref()
            .iter()
            .flat_map(|byte| [byte >> 4, byte & 15])
            .map(|n| char::from(DIGITS[n as usize]))
            .collect()
    }

    /// Whether `signature` is the text's signature. The comparison takes constant time.
    pub(crate) fn verifies(&self, text: &str, signature: &str) -> bool {
        from_hex(signature).is_some_and(|tag| hmac::verify(&self.0, text.as_bytes(), &tag).is_ok())
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningKey(not shown)")
    }
}

/// Generates a new key. `None` if the operating system provides no random numbers.
pub(crate) fn random_key() -> Option<[u8; KEY_BYTES]> {
    let mut key = [0; KEY_BYTES];
    SystemRandom::new().fill(&mut key).ok()?;
    Some(key)
}

fn from_hex(digits: &str) -> Option<[u8; SIGNATURE_DIGITS / 2]> {
    let mut bytes = [0; SIGNATURE_DIGITS / 2];
    if digits.len() != SIGNATURE_DIGITS {
        return None;
    }
    let (pairs, _) = digits.as_bytes().as_chunks::<2>();
    for (byte, &[high, low]) in bytes.iter_mut().zip(pairs) {
        // Upper case is refused, so that a signature has only one form.
        let value = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        *byte = value(high)? << 4 | value(low)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4231, test case 2.
    const SIGNATURE: &str = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";

    #[test]
    fn a_signature_matches_rfc_4231_and_any_other_text_key_or_form_is_refused() {
        let key = SigningKey::new(b"Jefe");
        let text = "what do ya want for nothing?";
        assert_eq!(key.sign(text), SIGNATURE);
        assert!(key.verifies(text, SIGNATURE));
        assert!(!key.verifies("what do ya want for nothing", SIGNATURE));
        assert!(!SigningKey::new(b"jefe").verifies(text, SIGNATURE));
        let mangled = [
            String::new(),
            SIGNATURE.to_uppercase(),
            SIGNATURE[1..].into(),
            format!("{SIGNATURE}0"),
            SIGNATURE.replacen('5', "6", 1),
            "é".repeat(32),
        ];
        for signature in mangled {
            assert!(!key.verifies(text, &signature), "{signature}");
        }
    }

    #[test]
    fn a_key_is_never_printed() {
        let log = LogIdentity { id: "log-1".into(), key: SigningKey::new(b"secret") };
        assert_eq!(format!("{log:?}"), "LogIdentity { id: \"log-1\", key: SigningKey(not shown) }");
    }
}
