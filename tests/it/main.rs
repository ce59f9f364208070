//! The integration tests: everything that needs a MySQL or MariaDB server and an SQS endpoint.
//! `localstack/test` starts them and runs these tests against both servers. Each test has its own
//! database and queue.

mod support;

mod alerts;
mod audit;
mod aws;
mod background;
mod boot_and_play;
mod claim_carry;
mod coalesce;
mod command_line;
mod connection_faults;
mod connections;
mod credentials;
mod declared;
mod declared_text;
mod deploy;
mod doctor;
mod documentation;
mod end_to_end;
mod event_log;
mod failover;
mod fence;
mod foreign_messages;
mod gaps;
mod grants;
mod handler_failures;
mod handlers;
mod hostile_files;
mod hostile_handlers;
mod idle;
mod infra;
mod lambda;
mod layers;
mod migrations;
mod missing_event_types;
mod parameter_types;
mod prepared_statements;
mod queue;
mod receiver;
mod relay;
mod release_gate;
mod retry_later;
mod server_errors;
mod server_settings;
mod truncated_log;
