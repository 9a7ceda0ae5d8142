"""`PostgresLedger`: sagas in a schema of a PostgreSQL database, for any number of processes and machines.

This is the only file that knows psycopg; the extra `postgres` brings it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from threading import Event
from typing import Any, Final, LiteralString, TypeVar

try:
    import psycopg
    from psycopg import sql
    from psycopg.abc import PQGen
    from psycopg.conninfo import conninfo_to_dict
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("PostgresLedger needs psycopg: pip install 'stageflow-saga[postgres]'", name="psycopg") from missing

from saga.errors import LedgerConflict, LedgerError, MisuseError
from saga.events import AnyEvent, SagaStatus
from saga.ledger import FORGETTABLE, Entry, is_name
from saga.ledgers.durable import MAX_EVENT_BYTES, DurableLedger
from saga.ledgers.rows import Acquire, Append, Beat, Create, Prune, Pruned, Redact, Release, Request, entries_in, events_in, others
from saga.ledgers.workers import again
from saga.owners import is_gone
from saga.text import bytes_of, shown

T = TypeVar("T")
Connection = psycopg.Connection[Any]

MIGRATIONS: Final[tuple[tuple[LiteralString, ...], ...]] = (
    (
        """CREATE TABLE sagas (
            number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            id text NOT NULL UNIQUE,
            pipeline text NOT NULL,
            parent text,
            parent_stage text,
            status text NOT NULL,
            started_at timestamptz NOT NULL,
            updated_at timestamptz NOT NULL,
            version bigint NOT NULL,
            token bigint NOT NULL,
            owner text
        )""",
        "CREATE INDEX sagas_by_parent ON sagas (parent) WHERE parent IS NOT NULL",
        "CREATE INDEX sagas_by_status ON sagas (status)",
        """CREATE TABLE events (
            number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            saga text NOT NULL,
            first bigint NOT NULL,
            checksum bigint NOT NULL,
            body text NOT NULL,
            UNIQUE (saga, first)
        )""",
        "CREATE TABLE owners (id text PRIMARY KEY, until timestamptz NOT NULL)",
        # In order, in one call, with an answer for each: in SQL alone, a second append of one saga in one batch could not see the first.
        """CREATE FUNCTION write(_requests json, _owners text[], _lease interval) RETURNS SETOF integer LANGUAGE plpgsql AS $$
        DECLARE
            asked record;
        BEGIN
            INSERT INTO owners (id, until) SELECT unnest(_owners), clock_timestamp() + _lease
            ON CONFLICT (id) DO UPDATE SET until = excluded.until;
            FOR asked IN SELECT * FROM json_to_recordset(_requests) AS asked (
                n integer, saga_id text, first bigint, added bigint, checksum bigint, body text, status text, at timestamptz,
                token bigint, release boolean, owner text, pipeline text, parent text, parent_stage text, started_at timestamptz,
                under bigint
            ) ORDER BY n LOOP
                IF asked.owner IS NOT NULL THEN
                    INSERT INTO sagas (id, pipeline, parent, parent_stage, status, started_at, updated_at, version, token, owner)
                    SELECT
                        asked.saga_id, asked.pipeline, asked.parent, asked.parent_stage, asked.status, asked.started_at, asked.at,
                        asked.added, 1, asked.owner
                    WHERE asked.under IS NULL
                        OR EXISTS (SELECT FROM sagas WHERE id = asked.parent AND token = asked.under FOR SHARE)
                    ON CONFLICT (id) DO NOTHING;
                ELSE
                    UPDATE sagas SET
                        version = version + asked.added,
                        status = coalesce(asked.status, status),
                        updated_at = asked.at,
                        owner = CASE WHEN asked.release THEN NULL ELSE owner END
                    WHERE id = asked.saga_id AND version = asked.first AND token = asked.token;
                END IF;
                IF FOUND THEN
                    INSERT INTO events (saga, first, checksum, body)
                    VALUES (asked.saga_id, asked.first, asked.checksum, asked.body);
                ELSE
                    RETURN NEXT asked.n;
                END IF;
            END LOOP;
        END $$""",
    ),
)
"""What makes a schema of version n out of one of version n - 1. Those that have been released are never changed."""

_WRITE: Final = "SELECT write(%s, %s, %s * interval '1 second')"
# One append alone, as most are; the function takes half as long again for it.
_APPEND: Final = """
    WITH written AS (
        UPDATE sagas SET
            version = version + %(added)s,
            status = coalesce(%(status)s, status),
            updated_at = %(at)s,
            owner = CASE WHEN %(release)s THEN NULL ELSE owner END
        WHERE id = %(saga_id)s AND version = %(first)s AND token = %(token)s RETURNING id
    )
    INSERT INTO events (saga, first, checksum, body) SELECT id, %(first)s, %(checksum)s, %(body)s FROM written
"""
_BEAT: Final = """
    INSERT INTO owners (id, until) VALUES (%s, clock_timestamp() + %s * interval '1 second')
    ON CONFLICT (id) DO UPDATE SET until = excluded.until
"""
_DISOWN: Final = """
    UPDATE sagas SET owner = NULL FROM unnest(%s::text[], %s::text[]) AS lost (saga, holder) WHERE id = saga AND owner = holder
"""
_RELEASE: Final = """
    UPDATE sagas SET owner = NULL FROM unnest(%s::text[], %s::bigint[]) AS given (saga, lease) WHERE id = saga AND token = lease
"""
# When a lease ends that does so by the server's clock, by the clock of who asks, who compares the two.
_HOLDER: Final = """
    SELECT version, token, owner, until + (%s - statement_timestamp()), coalesce(until >= clock_timestamp(), false)
    FROM sagas LEFT JOIN owners ON owners.id = owner WHERE sagas.id = %s
"""
_TAKE_BELOW: Final = """
    WITH RECURSIVE below (id) AS (
        SELECT id FROM sagas WHERE parent = %s UNION SELECT sagas.id FROM below JOIN sagas ON parent = below.id
    )
    UPDATE sagas SET owner = NULL, token = token + 1 WHERE id IN (SELECT id FROM below) AND owner = %s
"""
_READ: Final = """
    SELECT version, pipeline, parent, parent_stage, first, checksum, body
    FROM (SELECT %s::text AS id) AS asked LEFT JOIN sagas USING (id) LEFT JOIN events ON saga = asked.id ORDER BY first
"""
# Times as texts: for one that Python can't hold, psycopg would fail all rows.
_ENTRIES: Final = """
    SELECT
        sagas.id, pipeline, status, started_at::text, updated_at::text, parent, parent_stage, owner,
        (until + (%(now)s - statement_timestamp()))::text
    FROM sagas LEFT JOIN owners ON owners.id = owner
    WHERE (%(others)s::text[] IS NULL OR status <> ALL(%(others)s)) AND (%(parent)s::text IS NULL OR parent = %(parent)s)
    ORDER BY number
"""
_OLD: Final = """
    WITH RECURSIVE roots AS (
        SELECT number, id FROM sagas
        WHERE number > %(after)s AND status = ANY(%(over)s) AND updated_at < %(before)s
            AND NOT EXISTS (SELECT 1 FROM sagas AS above WHERE above.id = sagas.parent)
        ORDER BY number LIMIT 500
    ),
    families (root, id) AS (
        SELECT number, id FROM roots UNION ALL SELECT root, sagas.id FROM families JOIN sagas ON parent = families.id
    )
    SELECT root, sagas.id, bool_and(
        status = ANY(%(over)s) AND updated_at < %(before)s AND (owner IS NULL OR until IS NULL OR until < clock_timestamp())
    ) OVER (PARTITION BY root)
    FROM families JOIN sagas ON sagas.id = families.id LEFT JOIN owners ON owners.id = owner ORDER BY root
"""
_TOKEN: Final = 1
"""The lease's token of a saga that was just created."""
_ENCODINGS: Final = frozenset({"UTF8", "SQL_ASCII"})
"""Those of databases that hold any text; others refuse an output with a character of which they do not know, in the middle of a saga."""
_LONGEST_SCHEMA: Final = 63
"""Bytes; PostgreSQL cuts longer names, and two that begin alike would be one ledger."""
_LONGEST: Final = 2**31 // 1000
"""Seconds; PostgreSQL counts its own times in milliseconds of 32 bits."""
_LONGEST_PROBE: Final = 2**15 - 1
"""Seconds; Linux takes no more between two signs of life of a connection."""
_AGAIN: Final = frozenset({"40001", "40P01", "57014", "25006"})
"""Nothing was done, and it may go well the next time: a conflict between transactions; somebody cancelled it, or the role's
`statement_timeout` did; the server may only be read, as in a failover before it is promoted.
"""
_FORBIDDEN: Final = "42501"
"""The role may not do that; to wait changes nothing."""
_HINT: Final = "In a URL, the @, / and % of a user or a password are written %40, %2F and %25."


class PostgresLedger(DurableLedger):
    """Keeps sagas in a schema of a PostgreSQL database.

    An append is on disk before the call returns; those of many sagas that come together share one commit. Any number of processes
    may use the schema at once. When the connection breaks, the ledger connects again and finds out by reading what became of the
    appends that were under way.

    Args:
        dsn: Where the database is: a URL or a connection string of libpq.
        schema: The schema, with a name of at most 63 bytes; it is made when it is first used.
        exists: The ledger is there already: where none is, none is made, and whoever asks it for something gets a `LedgerError`.
        lease: Seconds after which an owner that did not `beat` counts as gone, by the server's clock.
        patience: Seconds that a batch of appends waits for a server that is gone or may only be read, or for locks of others, before it
            fails; an append that comes meanwhile waits for that, too, and so does `beat`: at most a third of `lease`. The default is 10,
            or that third if it is less. A server that hangs is given up when it has said nothing for twice as long.
        max_event_bytes: How many bytes of JSON one event may have.
        redact: What every event goes through before it is stored. What it takes out is missing when a saga is resumed, too.

    Raises:
        MisuseError: An argument makes no sense.
    """

    def __init__(
        self,
        dsn: str,
        *,
        schema: str = "saga",
        exists: bool = False,
        lease: float = 30.0,
        patience: float | None = None,
        max_event_bytes: int = MAX_EVENT_BYTES,
        redact: Redact | None = None,
    ) -> None:
        if not isinstance(dsn, str):
            raise MisuseError("a connection string or URL of PostgreSQL", got=f"a {type(dsn).__name__}")
        try:
            where = conninfo_to_dict(dsn)
        except psycopg.ProgrammingError:
            # Not even as its cause: the error may quote the string, which may hold a password.
            raise MisuseError("a connection string or URL of PostgreSQL", got="one that libpq can't read", hint=_HINT) from None
        # libpq ends a user at an @ in it, and a password at an @ or a /, and takes the rest for what errors show. (A host that begins with
        # @ is a socket.)
        shown_in_errors = str(where.get("host", ""))[1:] + str(where.get("port", "")) + str(where.get("dbname", ""))
        if "://" in dsn and "@" in shown_in_errors:
            raise MisuseError("a URL of PostgreSQL", got="one with an @ in the host, the port or the database", hint=_HINT)
        if not (isinstance(schema, str) and is_name(schema) and 0 < bytes_of(schema) <= _LONGEST_SCHEMA):
            raise MisuseError(f"a name of 1 to {_LONGEST_SCHEMA} bytes for the schema, without NUL and surrogates", got=shown(schema))
        super().__init__(
            f"PostgresLedger({where.get('dbname', '')!r}, schema={schema!r})",
            partial(_Store, dsn, schema, lease, was_there=Event(), exists=exists),
            lease=lease,
            patience=patience,
            max_event_bytes=max_event_bytes,
            redact=redact,
        )


class _Connection(psycopg.Connection[Any]):
    """Breaks when the server owes an answer and says nothing, as one that hangs does while its machine still takes what is sent to it.

    Neither libpq nor the machine notices that: all is acknowledged.

    Attributes:
        silence: Seconds for which it may say nothing.
    """

    silence: float = math.inf

    def wait(self, gen: PQGen[T], *args: Any, **options: Any) -> T:
        """Wait for what comes of a step of psycopg's."""
        return super().wait(self._listening(gen), *args, **options)

    def _listening(self, gen: PQGen[T]) -> PQGen[T]:
        heard = time.monotonic()
        try:
            wanted = next(gen)
            while True:
                # psycopg looks up ten times a second, also when nothing is ready.
                ready = yield wanted
                if ready:
                    heard = time.monotonic()
                elif time.monotonic() > heard + self.silence:
                    self.close()
                    raise psycopg.OperationalError(f"the server has said nothing for {self.silence:g} s")
                wanted = gen.send(ready)
        except StopIteration as end:
            result: T = end.value
            return result


class _Store:
    def __init__(self, dsn: str, schema: str, lease: float, patience: float, was_there: Event, *, exists: bool = False) -> None:
        self._dsn = dsn
        self._schema = schema
        self._exists = exists
        self._was_there = was_there
        self._lease = lease
        self._patience = min(patience, _LONGEST)
        self._opened: Connection | None = None
        # What was begun or taken by an owner that does not know of it, but beats on for other sagas.
        self._lost: list[tuple[str, str]] = []

    # -- requests ------------------------------------------------------------------------------------------------

    def write(self, requests: Sequence[Request]) -> Sequence[Any]:
        answers: dict[int, Any] = {}

        def lost() -> None:
            left = [request for n, request in enumerate(requests) if n not in answers]
            self._lost += [(request.saga_id, request.owner) for request in left if isinstance(request, Create | Acquire)]

        try:
            self._patiently(lambda connection, in_doubt: self._carry_out(connection, requests, answers, in_doubt), lost)
        except LedgerError as error:
            return [answers[n] if n in answers else again(error) for n in range(len(requests))]
        return [answers[n] for n in range(len(requests))]

    def _carry_out(self, connection: Connection, requests: Sequence[Request], answers: dict[int, Any], in_doubt: bool) -> None:  # noqa: FBT001 - see _patiently
        """Carry out what has no answer yet: what has one is committed, and must not be done again when something behind it fails."""
        if self._lost:
            # Before anything else: a saga that runs one of them may be given back here, and who goes on with it would find that one held.
            connection.execute(_DISOWN, tuple(map(list, zip(*self._lost, strict=True))))
            self._lost.clear()
        for n, request in enumerate(requests):
            if isinstance(request, Beat) and n not in answers:
                # Before what may have to wait for locks of others, and fail of it: its owner lives on.
                connection.execute(_BEAT, (request.owner, self._lease))
                answers[n] = None
        left = [(n, request) for n, request in enumerate(requests) if n not in answers]
        rows = [_row(n, request) for n, request in left if isinstance(request, Create | Append)]
        owners = list({request.owner for _, request in left if isinstance(request, Create)})
        refused = self._write(connection, rows, owners, answers) if rows else {}
        released = {n: request for n, request in left if isinstance(request, Release)}
        if released:
            # As one: where a ledger was out of reach, there are thousands.
            connection.execute(_RELEASE, tuple(map(list, zip(*released.values(), strict=True))))
            answers.update(dict.fromkeys(released))
        for n, request in left:
            if n not in answers and not isinstance(request, Release | Beat):
                answers[n] = self._answer(connection, request, refused.get(n), in_doubt)

    def _write(
        self, connection: Connection, rows: Sequence[dict[str, Any]], owners: Sequence[str], answers: dict[int, Any]
    ) -> dict[int, psycopg.Error | None]:
        """Write and answer what can be written; the numbers of the rows that can't, with the error if there was one."""
        refused: dict[int, psycopg.Error | None]
        try:
            if len(rows) == 1 and not owners:
                refused = {} if connection.execute(_APPEND, rows[0]).rowcount else {rows[0]["n"]: None}
            else:
                refused = {n: None for (n,) in connection.execute(_WRITE, (json.dumps(rows, ensure_ascii=False), owners, self._lease))}
        except psycopg.Error as error:
            if _is_everybodys(connection, error):
                raise
            if len(rows) > 1:
                # It is about one of them, and each by itself shows which.
                return {n: error for row in rows for n, error in self._write(connection, (row,), owners, answers).items()}
            refused = {rows[0]["n"]: error}
        answers.update((row["n"], _TOKEN if "owner" in row else None) for row in rows if row["n"] not in refused)
        return refused

    def _answer(
        self,
        connection: Connection,
        request: Append | Create | Acquire | Prune,
        refused: psycopg.Error | None,
        in_doubt: bool,  # noqa: FBT001 - see _patiently
    ) -> Any:
        try:
            match request:
                case Append() | Create():
                    if not (in_doubt and self._is_there(connection, request)):
                        self._refuse(connection, request, refused, in_doubt=in_doubt)
                    return _TOKEN if isinstance(request, Create) else None
                case Acquire():
                    return self._acquire(connection, request)
            return self._prune(connection, request)
        except LedgerConflict as conflict:
            return conflict
        except psycopg.Error as error:
            if _is_everybodys(connection, error):
                raise
            return self._told(error, in_doubt=in_doubt)

    def _is_there(self, connection: Connection, request: Create | Append) -> bool:
        """Whether what is refused was recorded when it was first written, and only the answer got lost."""
        ours = "SELECT FROM events JOIN sagas ON sagas.id = saga WHERE saga = %s AND first = %s AND checksum = %s AND token = %s"
        # Under a later token, whoever holds it has gone on from there: it does not guard what we would do next.
        token = _TOKEN if isinstance(request, Create) else request.token
        return connection.execute(ours, (request.saga_id, request.row.first, request.row.checksum, token)).fetchone() is not None

    def _refuse(self, connection: Connection, request: Create | Append, error: psycopg.Error | None, *, in_doubt: bool) -> None:
        if error is not None:
            raise error
        saga_id = request.saga_id
        if isinstance(request, Create):
            if request.under is not None:
                self._refuse_overtaken(connection, str(request.parent), request.under)
            raise LedgerConflict.exists(saga_id)
        version, token, holder, until, _ = self._holder(connection, saga_id)
        if token != request.token:
            outcome = _outcome(in_doubt=in_doubt)
            raise LedgerConflict.overtaken(saga_id, request.token, token, holder=holder, until=until, outcome=outcome)
        raise LedgerConflict.outdated(saga_id, request.row.first, version)

    def _holder(self, connection: Connection, saga_id: str) -> tuple[int, int, str | None, datetime | None, bool]:
        found: tuple[int, int, str | None, datetime | None, bool] | None = connection.execute(
            _HOLDER, (datetime.now(UTC), saga_id)
        ).fetchone()
        if found is None:
            raise LedgerConflict.missing(saga_id)
        return found

    def _refuse_overtaken(self, connection: Connection, parent: str, under: int) -> None:
        _, token, holder, until, _ = self._holder(connection, parent)
        if token != under:
            raise LedgerConflict.overtaken(parent, under, token, holder=holder, until=until)

    def _acquire(self, connection: Connection, request: Acquire) -> int:
        saga_id, owner, under = request
        with connection.transaction():
            # In a statement of its own: whoever waited for the row here would else see the new owner, but not its beat.
            row = connection.execute("SELECT parent FROM sagas WHERE id = %s FOR UPDATE", (saga_id,)).fetchone()
            _, token, holder, until, is_alive = self._holder(connection, saga_id)
            if under is not None and row is not None:
                connection.execute("SELECT FROM sagas WHERE id = %s FOR SHARE", row)
                self._refuse_overtaken(connection, row[0], under)
            if holder is not None and holder != owner and is_alive and not is_gone(holder):
                raise LedgerConflict.held(saga_id, holder=holder, until=until)
            connection.execute("UPDATE sagas SET owner = %s, token = token + 1 WHERE id = %s", (owner, saga_id))
            if holder not in {None, owner}:
                connection.execute(_TAKE_BELOW, (saga_id, holder))
            connection.execute(_BEAT, (owner, self._lease))
        return token + 1

    def _prune(self, connection: Connection, request: Prune) -> Pruned:
        with connection.transaction():
            # Nobody may take up one of them between the look and the deletion; nor be about to, with its row locked: each would wait for
            # the other.
            connection.execute("LOCK TABLE sagas IN EXCLUSIVE MODE")
            values = {"after": request.after, "before": request.before, "over": [status.value for status in FORGETTABLE]}
            found = connection.execute(_OLD, values).fetchall()
            forgotten = [saga_id for _, saga_id, is_over in found if is_over]
            connection.execute("DELETE FROM events WHERE saga = ANY(%s)", (forgotten,))
            connection.execute("DELETE FROM sagas WHERE id = ANY(%s)", (forgotten,))
        if not found:
            # By itself: whoever writes takes owners before sagas, and would wait for us while we wait for him.
            # Once, at the end: it looks at every saga.
            connection.execute(
                "DELETE FROM owners WHERE until < clock_timestamp() AND NOT EXISTS (SELECT 1 FROM sagas WHERE owner = owners.id)"
            )
        return Pruned(tuple(forgotten), found[-1][0] if found else None)

    def read(self, saga_id: str) -> Sequence[AnyEvent]:
        found = self._patiently(lambda connection, _: connection.execute(_READ, (saga_id,)).fetchall())
        version, *began = found[0][:4]
        rows = [(first, checksum, body.encode()) for *_, first, checksum, body in found if first is not None]
        return events_in(saga_id, version, began, rows)

    def list(self, statuses: Collection[SagaStatus] | None, parent: str | None) -> Sequence[Entry]:
        values = {"others": None if statuses is None else others(statuses), "parent": parent}
        rows = self._patiently(lambda connection, _: connection.execute(_ENTRIES, values | {"now": datetime.now(UTC)}).fetchall())
        return entries_in(rows, _when)

    # -- the connection ------------------------------------------------------------------------------------------

    def _patiently(self, work: Callable[[Connection, bool], T], lost: Callable[[], None] | None = None) -> T:
        """Do it, and if the connection breaks do it again; what records is told when it may have been done before.

        Args:
            work: What is done.
            lost: Called when it is given up and may have been done; None: it records nothing.
        """
        deadline, pause, in_doubt = time.monotonic() + self._patience, 0.05, False
        while True:
            is_sent = False
            try:
                connection = self._connection()
                is_sent = True
                return work(connection, in_doubt)
            except psycopg.Error as error:
                is_gone = self._opened is None or self._opened.closed
                in_doubt = in_doubt or (lost is not None and is_gone and is_sent)
                # The next one connects anew: what is in its way may be what the server said of this connection when it began.
                self.close()
                may_pass = error.sqlstate in _AGAIN or (is_gone and error.sqlstate != _FORBIDDEN)
                if not may_pass or time.monotonic() + pause > deadline:
                    if lost is not None and in_doubt:
                        lost()
                    raise self._told(error, in_doubt=in_doubt) from error
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _connection(self) -> Connection:
        if self._opened is None:
            connection = _Connection.connect(**self._parameters(), autocommit=True)
            # A lock that is not to be had is told by the server itself, before that.
            connection.silence = 2 * math.ceil(self._patience)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._opened = connection
        return self._opened

    def _parameters(self) -> dict[str, Any]:
        # A server that is cut off from the network is noticed after `patience`, too, not after the quarter of an hour that TCP takes,
        # or after two hours where the server has the question and owes the answer.
        seconds = math.ceil(self._patience)
        probes = min(math.ceil(self._patience / 3), _LONGEST_PROBE)
        defaults = {
            "connect_timeout": seconds,
            "tcp_user_timeout": seconds * 1000,
            "keepalives_idle": probes,
            "keepalives_interval": probes,
            "application_name": "saga",
        }
        return defaults | conninfo_to_dict(self._dsn) | {"client_encoding": "utf8"}

    def _prepare(self, connection: Connection) -> None:
        encoding = connection.info.parameter_status("server_encoding")
        if encoding not in _ENCODINGS:
            raise LedgerError(
                f"the ledger in schema {self._schema!r} needs a database that can hold any text, with the encoding UTF8; "
                f"this one has {encoding}. Nothing was changed."
            )
        settings = {
            "search_path": sql.Identifier(self._schema).as_string(),
            "TimeZone": "UTC",
            "DateStyle": "ISO",  # psycopg reads no other
            "lock_timeout": f"{math.ceil(self._patience * 1000)}ms",
            # The server would keep the locks of a client that vanished or was suspended, for two hours by default, and those of `prune` are
            # in everybody's way. Half of it: who waits for them has no more patience.
            "idle_in_transaction_session_timeout": f"{math.ceil(self._patience / 2)}s",
        }
        for name, value in settings.items():
            connection.execute("SELECT set_config(%s, %s, false)", (name, value))
        # A server, database or role that does without it may; a ledger can't. What waits for replicas, too, is left as it is.
        connection.execute("SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'")
        # Asked before the look: while we wait, another connection may make the schema, and PostgreSQL goes on saying that it is not there
        # to a transaction that has looked for it before. Then to make it fails, and the next look finds it.
        was_there = self._was_there.is_set()
        if self._version(connection) < len(MIGRATIONS):
            with connection.transaction():
                self._migrate(connection, was_there=was_there)
        self._was_there.set()

    def _migrate(self, connection: Connection, *, was_there: bool) -> None:
        connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (f"saga ledger {self._schema}",))
        found = self._version(connection)  # once more, now that no other process can
        if not found:
            if was_there:
                # Sagas that run know of what is in it, and whoever puts it back would come upon a new one.
                raise LedgerError(
                    f"the ledger in schema {self._schema!r} is gone; put it back, or restart to begin a new one. None was made in its place"
                )
            if self._exists:
                raise LedgerError(f"there is no ledger in schema {self._schema!r} of this database; none was made")
            schema = sql.Identifier(self._schema)
            if connection.execute("SELECT to_regnamespace(%s)", (schema.as_string(),)).fetchone() == (None,):
                connection.execute(sql.SQL("CREATE SCHEMA {}").format(schema))
            connection.execute("CREATE TABLE schema_version (version integer NOT NULL)")
            connection.execute("INSERT INTO schema_version VALUES (0)")
        for statement in chain(*MIGRATIONS[found:]):
            connection.execute(statement)
        connection.execute("UPDATE schema_version SET version = %s", (len(MIGRATIONS),))

    def _version(self, connection: Connection) -> int:
        # By their whole names: whoever may not use the schema is told so, where a search would find nothing.
        tables = [sql.Identifier(self._schema, name).as_string() for name in ("schema_version", "sagas")]
        ((counts, is_ours),) = connection.execute("SELECT to_regclass(%s) IS NOT NULL, to_regclass(%s) IS NOT NULL", tables).fetchall()
        if not counts:
            return 0
        # Of another program's it may have no such column.
        rows = connection.execute("SELECT version FROM schema_version").fetchall() if is_ours else []
        found = rows[0][0] if len(rows) == 1 else None
        if not (isinstance(found, int) and found > 0):
            raise LedgerError(
                f"expected a ledger in schema {self._schema!r}, got a table schema_version that is another program's, or damaged. "
                "Nothing was changed. Give the ledger a schema of its own."
            )
        if found > len(MIGRATIONS):
            raise LedgerError(
                f"the ledger in schema {self._schema!r} has schema version {found}, this version of saga knows up to {len(MIGRATIONS)}: "
                "it was written by a newer one. Nothing was changed."
            )
        return found

    def close(self) -> None:
        if self._opened is not None:
            with suppress(psycopg.Error):
                self._opened.close()
            self._opened = None

    def _told(self, error: psycopg.Error, *, in_doubt: bool) -> LedgerError:
        """Say what PostgreSQL says, and what is known."""
        why = error.diag.message_primary or str(error).strip()
        return LedgerError(f"the ledger in schema {self._schema!r} failed: {why}; {_outcome(in_doubt=in_doubt)}")


def _outcome(*, in_doubt: bool) -> str:
    return "whether it was recorded is not known" if in_doubt else "nothing was recorded"


def _is_everybodys(connection: Connection, error: psycopg.Error) -> bool:
    """Whether something stands in everybody's way: the connection broke, the disk is full, a lock is held, nothing may be written."""
    return connection.closed or isinstance(error, psycopg.OperationalError | psycopg.errors.ReadOnlySqlTransaction)


def _row(n: int, request: Create | Append) -> dict[str, Any]:
    row = request.row
    asked: dict[str, Any] = {
        "n": n,
        "saga_id": request.saga_id,
        "first": row.first,
        "added": row.added,
        "checksum": row.checksum,
        "body": row.body,
        "status": row.status,
        "at": row.at,
    }
    if isinstance(request, Append):
        return asked | {"token": request.token, "release": request.release}
    return asked | {
        "owner": request.owner,
        "pipeline": request.pipeline,
        "parent": request.parent,
        "parent_stage": request.parent_stage,
        "started_at": request.started_at,
        "under": request.under,
    }


def _when(moment: str | None) -> datetime | None:
    return None if moment is None else datetime.fromisoformat(moment)
