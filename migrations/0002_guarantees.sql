-- The state that the guarantees need. Every new column is nullable or has a default, so that
-- workers of the previous release keep working.
alter table event_log
  -- Signs each message of the relay (src/queue/message.rs). `migrate` and `rotate` set it from the
  -- operating system's random numbers. Anyone who can read this column can forge messages.
  add column signing_key        varbinary(64)   null,
  -- What blocks the high-water mark, and since when. Stored here so that short-lived processes know
  -- for how long. `blocked_last` is set only for a gap that is too wide to be filled automatically.
  add column blocked_position   bigint unsigned null,
  add column blocked_last       bigint unsigned null,
  add column blocked_since      datetime(6)     null,
  -- How many messages of other logs were received, and when last.
  add column foreign_messages   bigint unsigned not null default 0,
  add column foreign_at         datetime(6)     null,
  -- The position to which boot last moved `published` although nothing was sent: no projector
  -- needs these events from the queue.
  add column published_by_boot  bigint unsigned not null default 0,
  -- The queue to which the relay last published, as ARN or URL, so that a worker on another queue
  -- is noticed.
  add column queue              varchar(512)    character set utf8mb4 collate utf8mb4_bin null,
  add constraint event_log_blocked_is_whole
    check ((blocked_position is null) = (blocked_since is null));

alter table projectors
  -- The position at which the projector started: 0, or for from_now the mark at its first boot.
  -- Null: booted before this column existed.
  add column start_position     bigint unsigned null,
  -- The definition with which the projector was last booted, as SHA-256 in hexadecimal. Null:
  -- booted before this column existed.
  add column digest             char(64)        character set ascii collate ascii_bin null,
  -- The event types with which the projector was last booted, as a JSON list; ["*"] means all.
  -- Null: unknown.
  add column event_types        mediumtext      character set utf8mb4 collate utf8mb4_bin null,
  -- The tables that the setup created or declares, as a JSON list. Null: unknown.
  add column owned_tables       text            character set utf8mb4 collate utf8mb4_bin null,
  -- Set by the claim of a batch and cleared with its position, in one transaction. Other sessions
  -- therefore see it only if a handler committed in between. Then a part of the batch is stored
  -- without its position, and the batch must not be applied again.
  add column partially_applied  boolean         not null default false,
  -- Why the read model must be rebuilt: a table was lost, or only a part of a batch is stored. Boot
  -- never hands such a projector over.
  add column rebuild_reason     text            character set utf8mb4 collate utf8mb4_bin null,
  -- The projector waits for a later retry of the event after this position. At any other position
  -- the wait is over, so a commit need not clear these columns.
  add column retry_position     bigint unsigned null,
  -- When the first attempt failed, how many have failed, why the last one failed, and when the next
  -- one is due.
  add column retry_since        datetime(6)     null,
  add column retry_attempts     int unsigned    null,
  add column retry_reason       text            character set utf8mb4 collate utf8mb4_bin null,
  add column retry_at           datetime(6)     null,
  -- Whether an alert was sent because the wait has lasted for long. The worker that ends the wait
  -- then sends another one.
  add column retry_is_alerted   boolean         not null default false,
  add constraint projectors_retry_is_whole check (
    (retry_position is null) = (retry_since is null)
    and (retry_position is null) = (retry_attempts is null)
    and (retry_position is null) = (retry_reason is null)
    and (retry_position is null) = (retry_at is null)
  );

-- The ranges that an operator has accepted after an audit because rows were deleted or restored.
create table log_acceptances (
  id                 bigint unsigned not null auto_increment,
  first_position     bigint unsigned not null,
  last_position      bigint unsigned not null,
  -- How many of these positions had no row at the time of the acceptance.
  missing_positions  bigint unsigned not null,
  reason             varchar(1000)   character set utf8mb4 collate utf8mb4_bin not null,
  accepted_by        varchar(300)    character set utf8mb4 collate utf8mb4_bin not null,
  accepted_at        datetime(6)     not null default (utc_timestamp(6)),
  primary key (id),
  constraint log_acceptances_range_is_ordered check (first_position <= last_position)
) engine = innodb;
