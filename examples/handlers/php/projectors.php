<?php

/** Two read models and a reactor. One process serves the read models. */

declare(strict_types=1);

require __DIR__ . '/projectionist.php';

use Projectionist\Projector;
use Projectionist\Worker;

/** The state of each order. */
final class Orders extends Projector
{
    public function setup(PDO $db): void
    {
        $db->exec('create table if not exists orders (
            order_id varchar(64) primary key, customer varchar(100) not null,
            amount decimal(12, 2) not null, status varchar(20) not null)');
    }

    public function teardown(PDO $db): void
    {
        $db->exec('drop table if exists orders');
    }

    public function apply(array $event, PDO $db): void
    {
        ['stream_id' => $id, 'payload' => $payload] = $event;
        match ($event['event_type']) {
            'OrderPlaced' => $db->prepare('insert into orders values (?, ?, ?, "placed")')
                ->execute([$id, $payload['customer'], $payload['amount']]),
            'OrderPaid' => $db->prepare('update orders set status = "paid" where order_id = ?')
                ->execute([$id]),
            'OrderCancelled' => $db->prepare('delete from orders where order_id = ?')
                ->execute([$id]),
        };
    }
}

/** What each customer has paid. Adds up a batch in memory, and writes it with one statement. */
final class Balances extends Projector
{
    public function setup(PDO $db): void
    {
        $db->exec('create table if not exists balances (
            customer varchar(100) primary key, orders int not null, paid decimal(12, 2) not null)');
    }

    public function teardown(PDO $db): void
    {
        $db->exec('drop table if exists balances');
    }

    public function apply(array $event, PDO $db): void
    {
        $this->applyAll([$event], $db);
    }

    public function applyAll(array $events, PDO $db): void
    {
        $rows = [];
        foreach ($events as $event) {
            ['customer' => $customer, 'amount' => $amount] = $event['payload'];
            array_push($rows, $customer, $amount);
        }
        $values = implode(', ', array_fill(0, count($events), '(?, 1, ?)'));
        $db->prepare("insert into balances values $values on duplicate key update
            orders = orders + values(orders), paid = paid + values(paid)")->execute($rows);
    }
}

/** Sends a receipt for each paid order: here, a file. Its name is the idempotency key. */
final class Receipts extends Projector
{
    public function __construct(private readonly string $directory)
    {
    }

    public function apply(array $event, PDO $db): void
    {
        $text = "Dear {$event['payload']['customer']}, thank you for {$event['payload']['amount']}.\n";
        file_put_contents("$this->directory/{$event['event_id']}.txt", $text);
    }
}

(new Worker(
    static fn (): PDO => Projectionist\connect(getenv('HANDLER_DATABASE_URL')),
    [
        'orders' => new Orders(),
        'balances' => new Balances(),
        'receipts' => new Receipts(getenv('RECEIPTS_DIRECTORY') ?: '/tmp'),
    ],
))->run();
