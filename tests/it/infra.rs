//! What is in infra/: the templates, the deploy gate, and what its README tells a newcomer to do.

mod gate;
mod stand_in;
