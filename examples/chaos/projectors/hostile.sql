-- This procedure is not in the setup of the file, because a setup entry is a single statement.
create procedure hostile_handler (
  at_position bigint unsigned, of_event varchar(64), harm varchar(20)
)
begin
  insert into hostile (position, event_id) values (at_position, of_event);
  case at_position % 50
    when 0 then begin
      declare continue handler for sqlexception begin end;
      insert into no_such_table values (1);
    end;
    when 10 then begin
      set @hostile_zone = @@time_zone;
      set time_zone = '+07:00';
      set time_zone = @hostile_zone;
    end;
    when 20 then begin
      set @hostile_mode = @@sql_mode, @hostile_limit = @@sql_select_limit;
      set sql_mode = '', sql_select_limit = 1;
      set sql_mode = @hostile_mode, sql_select_limit = @hostile_limit;
    end;
    when 30 then set @hostile_left = at_position;
    when 40 then create temporary table if not exists hostile_left (n int);
    else begin end;
  end case;
  case harm
    when 'time_zone' then set time_zone = '+07:00';
    when 'sql_mode' then set sql_mode = '';
    when 'limit' then set sql_select_limit = 1;
    when 'isolation' then set session transaction isolation level read uncommitted;
    when 'charset' then set character_set_client = latin1, character_set_results = latin1;
    when 'error' then insert into no_such_table values (1);
    when 'rollback' then rollback;
    when 'commit' then commit;
    else begin end;
  end case;
end
