//! stub
use crate::registry::Registry;
pub(crate) fn load(_dir: &std::path::Path, _registry: &mut Registry) -> Result<(), String> {
    Ok(())
}
