<?php

/** The projector that `projectionist conformance` checks. */

declare(strict_types=1);

require __DIR__ . '/projectionist.php';

use Projectionist\Projector;
use Projectionist\Worker;

final class Conformance extends Projector
{
    public function setup(PDO $db): void
    {
        $db->exec('create table if not exists conformance (
            seq bigint auto_increment primary key, position bigint unsigned not null)');
    }

    public function teardown(PDO $db): void
    {
        $db->exec('drop table if exists conformance');
    }

    public function apply(array $event, PDO $db): void
    {
        $db->prepare('insert into conformance (position) values (?)')->execute([$event['position']]);
        match ($event['event_type']) {
            'Poison' => throw new RuntimeException('a poison event'),
            'Slow' => sleep(10),
            'Print' => print("printed\n"),
            default => null,
        };
    }
}

$connect = static fn (): PDO => Projectionist\connect(getenv('HANDLER_DATABASE_URL'));
(new Worker($connect, ['conformance' => new Conformance()]))->run();
