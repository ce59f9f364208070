//! Everything that needs real parts: a MySQL or MariaDB server and an SQS endpoint.
//! `localstack/test` brings them up and runs this on both servers; each test has a database and a
//! queue of its own.

mod support;

mod alerts;
mod audit;
mod aws;
mod background;
mod boot_and_play;
mod claim_carry;
mod connection_faults;
mod credentials;
mod deploy;
mod doctor;
mod documentation;
mod event_log;
mod failover;
mod fence;
mod foreign_messages;
mod gaps;
mod grants;
mod handler_failures;
mod hostile_files;
mod hostile_handlers;
mod infra;
mod lambda;
mod layers;
mod parameter_types;
mod queue;
mod receiver;
mod relay;
mod release_gate;
mod server_settings;
mod truncated_log;

mod coalesce;
mod command_line;
mod declared;
mod end_to_end;
