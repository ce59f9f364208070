-- What the guarantees need to remember. Every new column is nullable or has a default, so that
-- workers of the release before this one go on beside it.
alter table event_log
  -- Signs each message of the relay (src/queue/message.rs). `migrate` and `rotate` set it from the
  -- operating system's random numbers; whoever can read this column can forge messages.
  add column signing_key        varbinary(64)   null,
  -- What holds the high-water mark, and since when: kept here so that short-lived processes know
  -- the age, too. `blocked_last` is set only for a gap that is too wide to be filled unasked.
  add column blocked_position   bigint unsigned null,
  add column blocked_last       bigint unsigned null,
  add column blocked_since      datetime(6)     null,
  -- Messages in the queue that are not of this log: how many were seen, and when last.
  add column foreign_messages   bigint unsigned not null default 0,
  add column foreign_at         datetime(6)     null,
  -- The queue that the relay last published to, as its ARN or URL, so that a worker on another
  -- queue is noticed.
  add column queue              varchar(512)    character set utf8mb4 collate utf8mb4_bin null,
  add constraint event_log_blocked_is_whole check ((blocked_position is null) = (blocked_since is null));

alter table projectors
  -- Where it began: 0, or for from_now the mark of its first boot. Null: booted before this column
  -- existed.
  add column start_position     bigint unsigned null,
  -- The definition with which it was last booted, as SHA-256 in hexadecimal. Null: booted before
  -- this column existed.
  add column digest             char(64)        character set ascii collate ascii_bin null,
  -- The event types that it was last booted with, as a JSON list; ["*"] is all of them. Null: not
  -- known.
  add column event_types        mediumtext      character set utf8mb4 collate utf8mb4_bin null,
  -- The tables that its setup made or names, as a JSON list. Null: not known.
  add column owned_tables       text            character set utf8mb4 collate utf8mb4_bin null,
  -- Set by the claim of a batch and cleared with its position, in one transaction. So it is seen
  -- only where a handler committed in between: a part of that batch is stored without its position,
  -- and must not be applied again.
  add column partially_applied  boolean         not null default false,
  -- Why its read model cannot be carried on and must be rebuilt: a lost table, a batch of which
  -- only a part is stored. Boot never hands such a projector over.
  add column rebuild_reason     text            character set utf8mb4 collate utf8mb4_bin null;

-- What an operator has accepted in an audit: rows that were deleted or restored, by range.
create table log_acceptances (
  id                 bigint unsigned not null auto_increment,
  first_position     bigint unsigned not null,
  last_position      bigint unsigned not null,
  -- How many of these positions had no row when it was accepted.
  missing_positions  bigint unsigned not null,
  reason             varchar(1000)   character set utf8mb4 collate utf8mb4_bin not null,
  accepted_by        varchar(300)    character set utf8mb4 collate utf8mb4_bin not null,
  accepted_at        datetime(6)     not null default (utc_timestamp(6)),
  primary key (id),
  constraint log_acceptances_range_is_ordered check (first_position <= last_position)
) engine = innodb;
