<?php

/**
 * A client for Projectionist: reads batches of events from standard input, applies each in one
 * transaction, and answers on standard output. docs/handlers.md describes the protocol.
 */

declare(strict_types=1);

namespace Projectionist;

use PDO;
use PDOException;
use RuntimeException;
use Throwable;

const PROTOCOL = 1;

/** A deadlock, a lock wait timeout, a lost or a killed connection: a retry may succeed. */
const TRANSIENT_ERRORS = [1205, 1213, 1927, 2002, 2006, 2013, 3101, 4031];
const LOST_CONNECTION = [1927, 2002, 2006, 2013, 4031];

abstract class Projector
{
    /** Creates the tables. Must be harmless to repeat. */
    public function setup(PDO $db): void
    {
    }

    /** Removes what setup created. Must be harmless to repeat. */
    public function teardown(PDO $db): void
    {
    }

    /**
     * Applies one event in the open transaction. Must not commit.
     *
     * @param array<string, mixed> $event
     */
    abstract public function apply(array $event, PDO $db): void;

    /**
     * Applies the events of a batch, in order. Override it to write many events with one statement.
     *
     * @param list<array<string, mixed>> $events
     */
    public function applyAll(array $events, PDO $db): void
    {
        foreach ($events as $event) {
            try {
                $this->apply($event, $db);
            } catch (Throwable $error) {
                throw new EventFailed($event['position'], $error);
            }
        }
    }
}

/** Thrown by a projector that cannot apply its event now, although the event is not the cause. */
final class RetryLater extends RuntimeException
{
    public function __construct(string $message, public readonly float $seconds)
    {
        parent::__construct($message);
    }
}

/** Says at which event a batch failed. */
final class EventFailed extends RuntimeException
{
    public function __construct(public readonly int $position, Throwable $error)
    {
        parent::__construct($error->getMessage(), 0, $error);
    }
}

final class Worker
{
    private ?PDO $db = null;

    /**
     * @param callable(): PDO $connect opens a connection to the events' MySQL server
     * @param array<string, Projector> $projectors by name
     */
    public function __construct(private $connect, private readonly array $projectors)
    {
    }

    /** Answers messages until standard input is closed. */
    public function run(): void
    {
        // Only answers may be written to standard output. Warnings and `echo` become log lines.
        ini_set('display_errors', 'stderr');
        ob_start(static fn (string $text): string => fwrite(STDERR, $text) === false ? '' : '', 1);
        while (($line = fgets(STDIN)) !== false) {
            $message = json_decode($line, true, 512, JSON_THROW_ON_ERROR);
            $answer = $this->answer($message) + ['id' => $message['id']];
            fwrite(STDOUT, json_encode($answer, JSON_THROW_ON_ERROR | JSON_INVALID_UTF8_SUBSTITUTE) . "\n");
        }
    }

    /**
     * @param array<string, mixed> $message
     * @return array<string, mixed>
     */
    private function answer(array $message): array
    {
        try {
            $projector = $this->projectors[$message['name']]
                ?? throw new RuntimeException("there is no projector {$message['name']} here");
            switch ($message['type']) {
                case 'hello':
                    return ['type' => 'hello', 'protocol' => PROTOCOL];
                case 'setup':
                    $projector->setup($this->db());
                    return ['type' => 'done'];
                case 'teardown':
                    $projector->teardown($this->db());
                    return ['type' => 'done'];
                case 'batch':
                    return $this->apply($projector, $message);
                default:
                    throw new RuntimeException("unknown message {$message['type']}");
            }
        } catch (Throwable $error) {
            return $this->failure($error);
        }
    }

    /**
     * The fence and the projector's writes are one transaction. A batch without a fence is applied
     * at least once: the event's id is the idempotency key.
     *
     * @param array<string, mixed> $batch
     * @return array<string, mixed>
     */
    private function apply(Projector $projector, array $batch): array
    {
        $db = $this->db();
        $db->beginTransaction();
        if ($batch['fence'] !== null && $db->exec($batch['fence']) !== 1) {
            $db->rollBack();
            return ['type' => 'not_mine'];
        }
        $projector->applyAll($batch['events'], $db);
        try {
            $db->commit();
        } catch (Throwable $error) {
            // For instance, a statement has committed implicitly.
            throw new EventFailed($batch['through'], $error);
        }
        return ['type' => 'done'];
    }

    /** @return array<string, mixed> */
    private function failure(Throwable $error): array
    {
        $answer = ['type' => 'failed', 'message' => $error->getMessage()];
        if ($error instanceof EventFailed) {
            $answer['event'] = $error->position;
            $error = $error->getPrevious();
        }
        $number = $error instanceof PDOException ? ($error->errorInfo[1] ?? $error->getCode()) : 0;
        if ($error instanceof RetryLater) {
            $answer['retry_after'] = $error->seconds;
        } elseif (in_array($number, TRANSIENT_ERRORS, true)) {
            $answer['retry_after'] = 0.1;
        }
        try {
            if ($this->db?->inTransaction()) {
                $this->db->rollBack();
            }
        } catch (PDOException) {
            $this->db = null;
        }
        if (in_array($number, LOST_CONNECTION, true)) {
            $this->db = null;
        }
        return $answer;
    }

    private function db(): PDO
    {
        return $this->db ??= ($this->connect)();
    }
}

/** Opens a connection for a URL like mysql://user:password@host:3306/database. */
function connect(string $url): PDO
{
    $parts = parse_url($url) ?: throw new RuntimeException('the database URL is invalid');
    $database = ltrim($parts['path'] ?? '', '/');
    $port = $parts['port'] ?? 3306;
    return new PDO(
        "mysql:host={$parts['host']};port=$port;dbname=$database;charset=utf8mb4",
        rawurldecode($parts['user'] ?? ''),
        rawurldecode($parts['pass'] ?? ''),
        [PDO::ATTR_ERRMODE => PDO::ERRMODE_EXCEPTION, PDO::ATTR_EMULATE_PREPARES => false],
    );
}
