<?php

// Records the position of each event. Speaks the protocol without a client, so that FAULT can break
// each rule of it.
declare(strict_types=1);

$fault = getenv('FAULT') ?: 'none';
$table = getenv('TALLY') ?: 'tally';
$at = (int) (getenv('FAULT_AT') ?: 0);
$url = parse_url(getenv('HANDLER_DATABASE_URL'));
$db = new PDO(
    "mysql:host={$url['host']};port={$url['port']};dbname=" . ltrim($url['path'], '/'),
    $url['user'],
    $url['pass'] ?? '',
    [PDO::ATTR_ERRMODE => PDO::ERRMODE_EXCEPTION],
);
$answer = static function (array $answer): void {
    fwrite(STDOUT, json_encode($answer) . "\n");
};
while (($line = fgets(STDIN)) !== false) {
    $message = json_decode($line, true, 512, JSON_THROW_ON_ERROR);
    $id = $message['id'];
    if ($message['name'] !== $table) {
        $answer(['type' => 'failed', 'id' => $id, 'message' => 'there is no such projector']);
        continue;
    }
    if ($message['type'] === 'hello') {
        $answer(['type' => 'hello', 'id' => $id, 'protocol' => $fault === 'protocol' ? 2 : 1]);
        continue;
    }
    if ($message['type'] !== 'batch') {
        $db->exec($message['type'] === 'teardown' ? "drop table if exists $table"
            : "create table if not exists $table (seq bigint auto_increment primary key, position bigint unsigned not null)");
        $answer(['type' => 'done', 'id' => $id]);
        continue;
    }
    $positions = array_column($message['events'], 'position');
    $has_fault = $at === 0 || in_array($at, $positions, true);
    if ($has_fault && $fault === 'garbage') {
        echo "Warning: Undefined variable\n";
        continue;
    }
    if ($has_fault && $fault === 'long') {
        echo str_repeat('x', 1_000_000), "\n";
        continue;
    }
    if ($has_fault && $fault === 'exit') {
        exit(7);
    }
    if ($has_fault && $fault === 'slow') {
        sleep(60);
    }
    $db->beginTransaction();
    if ($fault !== 'no_fence' && $db->exec($message['fence']) !== 1) {
        $db->rollBack();
        $answer(['type' => 'not_mine', 'id' => $id]);
        continue;
    }
    if ($fault === 'early_commit') {
        $db->commit();
        $db->beginTransaction();
    }
    $insert = $db->prepare("insert into $table (position) values (?)");
    foreach ($message['events'] as ['position' => $position, 'event_type' => $type]) {
        if (($position === $at || $type === 'Poison') && in_array($fault, ['fails', 'early_commit', 'swallow'], true)) {
            $db->rollBack();
            $answer($fault === 'swallow' ? ['type' => 'done', 'id' => $id] : [
                'type' => 'failed', 'id' => $id, 'event' => $position, 'message' => 'a poison event',
            ]);
            continue 2;
        }
        $insert->execute([$position]);
    }
    if ($has_fault && $fault === 'once' && !file_exists(getenv('FAULT_FILE'))) {
        touch(getenv('FAULT_FILE'));
        $db->rollBack();
        $answer([
            'type' => 'failed', 'id' => $id, 'message' => 'a deadlock', 'retry_after' => 0.01,
        ]);
        continue;
    }
    $db->commit();
    if ($has_fault && $fault === 'exit_after_commit') {
        exit(7);
    }
    $answer(['type' => 'done', 'id' => $id]);
    if ($fault === 'exit_when_idle') {
        exit(0);
    }
}
