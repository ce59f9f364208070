-- The log. Programs in any language append to it with a plain insert, so this table is a
-- public interface.
create table events (
  -- The global order of events. Positions are assigned before commit, so rows become visible out of
  -- order, and rollbacks leave gaps. Readers stay at or below event_log.high_water, where neither
  -- can happen any more.
  position       bigint unsigned not null auto_increment,
  -- Any unique id. Also the idempotency key for effects outside the database.
  event_id       varchar(64)     character set ascii collate ascii_bin not null default (uuid()),
  -- Compared byte by byte: "Case-1" and "case-1" are two streams.
  stream_id      varchar(200)    character set utf8mb4 collate utf8mb4_bin not null,
  stream_version bigint unsigned not null,
  event_type     varchar(200)    character set utf8mb4 collate utf8mb4_bin not null,
  recorded_at    datetime(6)     not null default (utc_timestamp(6)),
  -- Text instead of json, so that the bytes are returned as they were appended. Reading is also 1.2
  -- times as fast on MySQL 9.7, which stores a json column in binary and formats it for every row.
  payload        mediumtext      character set utf8mb4 collate utf8mb4_bin not null,
  metadata       mediumtext      character set utf8mb4 collate utf8mb4_bin null,
  primary key (position),
  unique key events_event_id (event_id),
  -- Optimistic concurrency: if two writers append the same version, the second gets error 1062.
  unique key events_stream_version (stream_id, stream_version),
  constraint events_payload_is_json check (json_valid(payload)),
  constraint events_metadata_is_json check (json_valid(metadata))
) engine = innodb;

-- The state of the log as a whole, in one row.
create table event_log (
  singleton              tinyint unsigned not null default 1,
  -- The id of the log. Every message contains it, so that a message of another environment is
  -- recognized as foreign.
  log_id                 varchar(36)     character set ascii collate ascii_bin not null,
  -- The highest position at or below which no event can still become visible.
  high_water             bigint unsigned not null default 0,
  -- The number and the fingerprint of the rows that the mark has passed (src/store/fingerprint.rs).
  row_count              bigint unsigned not null default 0,
  fingerprint            bigint unsigned not null default 0,
  -- Every event up to this position has been sent to the queue.
  published              bigint unsigned not null default 0,
  -- The relay's lease. Two relays at once are harmless but wasteful.
  relay_lease_holder     varchar(64)     character set ascii collate ascii_bin null,
  relay_lease_expires_at datetime(6)     null,
  primary key (singleton),
  constraint event_log_has_one_row check (singleton = 1),
  constraint event_log_published_is_below_high_water check (published <= high_water)
) engine = innodb;

insert into event_log (log_id) values (uuid());

-- The ledger: the only authority on which events have been applied.
create table projectors (
  name                varchar(100)    character set ascii collate ascii_bin not null,
  version             int unsigned    not null,
  mode                varchar(20)     character set ascii collate ascii_bin not null,
  status              varchar(20)     character set ascii collate ascii_bin not null,
  -- Every event up to this position that the projector subscribes to has been applied, once.
  position            bigint unsigned not null,
  -- Stored here so that retire knows it after the code was removed. Such a row is never deleted.
  has_side_effects    boolean         not null,
  failed_position     bigint unsigned null,
  failed_event_id     varchar(64)     character set ascii collate ascii_bin null,
  failed_event_type   varchar(200)    character set utf8mb4 collate utf8mb4_bin null,
  failed_error        text            character set utf8mb4 null,
  failed_at           datetime(6)     null,
  -- How often the event was tried, which release failed (it has the bug), and on which host (it has
  -- the logs).
  failed_attempts     int unsigned    null,
  failed_release      varchar(200)    character set utf8mb4 null,
  failed_host         varchar(255)    character set utf8mb4 null,
  created_at          datetime(6)     not null default (utc_timestamp(6)),
  status_changed_at   datetime(6)     not null default (utc_timestamp(6)),
  primary key (name, version),
  constraint projectors_mode_is_known check (mode in ('from_beginning', 'from_now', 'once')),
  constraint projectors_status_is_known
    check (status in ('booting', 'live', 'broken', 'stalled', 'finished', 'retired')),
  constraint projectors_broken_has_error check ((status = 'broken') = (failed_error is not null)),
  constraint projectors_failure_is_whole check (
    (failed_error is null) = (failed_at is null)
    and (failed_error is null) = (failed_attempts is null)
    and (failed_error is null) = (failed_host is null)
  ),
  -- The position of a broken projector is just before the event that failed, until a boot applies
  -- the event.
  constraint projectors_failure_is_at_most_next
    check (failed_position is null or failed_position <= position + 1)
) engine = innodb;
