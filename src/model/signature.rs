//! The signature of a message: HMAC-SHA256, with a key that is kept in the database beside the
//! log's id.

use std::fmt;

use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};

use crate::model::error::Error;

/// The length of a key: that of the hash, as RFC 2104 advises.
pub(crate) const KEY_BYTES: usize = 32;

/// A signature in hexadecimal digits.
pub(crate) const SIGNATURE_DIGITS: usize = 64;

/// Which log it is, and the key that proves a message to be of it.
#[derive(Debug, Clone)]
pub(crate) struct LogIdentity {
    /// Travels in every message.
    pub(crate) id: String,
    /// Never leaves the process.
    pub(crate) key: SigningKey,
}

/// A key that signs messages. Whoever has it can forge them, so that nothing prints it.
#[derive(Clone)]
pub(crate) struct SigningKey(hmac::Key);

impl SigningKey {
    pub(crate) fn new(key: &[u8]) -> Self {
        SigningKey(hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    /// Signs a text.
    pub(crate) fn sign(&self, text: &str) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let tag = hmac::sign(&self.0, text.as_bytes());
        tag.as_ref()
            .iter()
            .flat_map(|byte| [byte >> 4, byte & 15])
            .map(|n| char::from(DIGITS[n as usize]))
            .collect()
    }

    /// Whether this is the text's signature. Takes as long whatever the difference is.
    pub(crate) fn verifies(&self, text: &str, signature: &str) -> bool {
        from_hex(signature).is_some_and(|tag| hmac::verify(&self.0, text.as_bytes(), &tag).is_ok())
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningKey(not shown)")
    }
}

/// The bytes of a new key.
///
/// # Errors
/// [`Error::Input`] if the operating system gives no random numbers.
pub(crate) fn random_key() -> Result<[u8; KEY_BYTES], Error> {
    let mut key = [0; KEY_BYTES];
    match SystemRandom::new().fill(&mut key) {
        Ok(()) => Ok(key),
        Err(_) => Err(Error::Input(
            "the operating system gives no random numbers to make a key of".into(),
        )),
    }
}

fn from_hex(digits: &str) -> Option<[u8; SIGNATURE_DIGITS / 2]> {
    let mut bytes = [0; SIGNATURE_DIGITS / 2];
    if digits.len() != SIGNATURE_DIGITS {
        return None;
    }
    let (pairs, _) = digits.as_bytes().as_chunks::<2>();
    for (byte, &[high, low]) in bytes.iter_mut().zip(pairs) {
        // No upper case: one signature has one form.
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
