//! Everything that needs real parts: a MySQL or MariaDB server and an SQS endpoint. `localstack/test` brings
//! them up and runs this on both servers; each test has a database and a queue of its own.

mod support;

mod alerts;
mod audit;
mod aws;
mod cable;
mod convoy;
mod deploy;
mod doctor;
mod documentation;
mod failover;
mod fence;
mod foreign_messages;
mod gate_truth;
mod grants;
mod handler;
mod hold;
mod holes;
mod hostile;
mod hostile_files;
mod infra;
mod intake;
mod lambda;
mod layers;
mod log;
mod log_end;
mod login;
mod queue;
mod relay;
mod settings;
mod story;
mod types;

mod coalesce;
mod command_line;
mod declared;
mod receipt;
