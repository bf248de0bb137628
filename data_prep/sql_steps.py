"""The steps of ``pipeline.build`` as SQL statements, for logs that do not fit into memory.

Tables: ``log`` (see LogStore); ``users`` and ``items``, whose row numbers are the codes u and i in the order of the
external ids; ``events`` (seq, u, i, time), the log in codes, one row per interaction that is left; ``samples``
(u, history, target, time, before, place, recent), in the order of the samples.
"""

from __future__ import annotations

#: Row numbers of a table that was created by a query with ORDER BY are the ranks in that order.
_RANKED = "CREATE TABLE {table} AS SELECT DISTINCT {column} FROM {source} ORDER BY {column}"

COUNTS = "SELECT count(*), count(DISTINCT u), count(DISTINCT i) FROM events"
HAS_FRACTIONS = "SELECT count(*) > 0 FROM log WHERE fraction <> 0"
#: Items of ``events`` with their number of interactions.
REVIEWED = """
    SELECT item_id, reviews FROM (SELECT i, count(*) AS reviews FROM events GROUP BY i)
    JOIN items ON i = items.rowid
"""
USABLE = "SELECT * FROM events WHERE i IN (SELECT items.rowid FROM items JOIN usable USING (item_id))"


def code_log(fractions: bool) -> list[str]:
    """Codes for users and items, and ``events`` without exact duplicates, of which the first in the log stays.

    With ``fractions`` the log's order is that of the finer times, else that of the file.
    """
    order = ["CREATE TABLE fine AS SELECT seq FROM log ORDER BY time, fraction, seq"] if fractions else []
    seq, join = ("fine.rowid", "JOIN fine ON log.seq = fine.seq") if fractions else ("log.seq", "")
    return [
        _RANKED.format(table="users", column="user_id", source="log"),
        _RANKED.format(table="items", column="item_id", source="log"),
        *order,
        f"""
        CREATE TABLE events AS
        SELECT min({seq}) AS seq, CAST(users.rowid AS UINTEGER) AS u, CAST(items.rowid AS UINTEGER) AS i, time
        FROM log JOIN users ON log.user_id = users.user_id JOIN items ON log.item_id = items.item_id {join}
        GROUP BY users.rowid, items.rowid, time
        """,
    ]


def core_round(k: int) -> str:
    """One round of the k-core: the events whose user and whose item both have at least k of them."""
    return f"""
        SELECT * FROM events
        WHERE u IN (SELECT u FROM events GROUP BY u HAVING count(*) >= {k})
          AND i IN (SELECT i FROM events GROUP BY i HAVING count(*) >= {k})
    """


#: Codes of the users and items that are left: row numbers of these tables.
FINAL_CODES = [
    _RANKED.format(table="final_users", column="u", source="events"),
    _RANKED.format(table="final_items", column="i", source="events"),
]
#: ``shuffle`` (tie, n) gives the n-th event in the log's order its place among equal times.
SHUFFLED = [
    "CREATE TABLE log_order AS SELECT seq FROM events ORDER BY seq",
    "CREATE TABLE shuffle (tie BIGINT, n BIGINT)",
]
USERS = """
    SELECT final_users.rowid AS user, user_id AS external_id
    FROM final_users JOIN users ON u = users.rowid ORDER BY final_users.rowid
"""
USERS_SIZE = """
    SELECT count(*), coalesce(sum(strlen(user_id)), 0) FROM final_users JOIN users ON u = users.rowid
"""
ITEMS = "SELECT item_id FROM final_items JOIN items ON i = items.rowid ORDER BY final_items.rowid"


def windows(max_history: int, ties: str) -> str:
    """``samples``: every event of a user but the first, with the up to ``max_history`` before it as its history.

    ``ties``: what orders equal times of a user, as prepare.ties. ``before`` is the time of the event before, ``place``
    counts a user's events from 1, ``recent`` is 0 for a user's last event, 1 for the one before and 2 for the others.
    """
    tie = {"file": "seq", "item": "i", "random": "tie"}[ties]
    join = "JOIN log_order USING (seq) JOIN shuffle ON log_order.rowid = n" if ties == "random" else ""
    return f"""
        CREATE TABLE samples AS
        SELECT u, history, target, time, before, place, recent FROM (
            SELECT
                u, i AS target, time,
                list(i) OVER past AS history,
                lag(time) OVER own AS before,
                row_number() OVER own AS place,
                CASE WHEN lead(time) OVER own IS NULL THEN 0 WHEN lead(time, 2) OVER own IS NULL THEN 1 ELSE 2 END
                    AS recent
            FROM (
                SELECT
                    CAST(final_users.rowid AS UINTEGER) AS u, CAST(final_items.rowid AS UINTEGER) AS i, time,
                    {tie if ties != "item" else "final_items.rowid"} AS tie
                FROM events
                JOIN final_users ON events.u = final_users.u JOIN final_items ON events.i = final_items.i {join}
            )
            WINDOW
                own AS (PARTITION BY u ORDER BY time, tie),
                past AS (PARTITION BY u ORDER BY time, tie ROWS BETWEEN {max_history} PRECEDING AND 1 PRECEDING)
        )
        WHERE place > 1
        ORDER BY time, u, place
    """


SAMPLE_COUNTS = """
    SELECT (SELECT count(*) FROM samples), (SELECT count(*) FROM final_users), (SELECT count(*) FROM final_items)
"""
TIES = """
    SELECT
        count(*),
        count(*) FILTER (time = before),
        count(*) FILTER (time = before AND target <> history[-1]),
        count(*) FILTER (time = before AND target > history[-1])
    FROM samples
"""
#: Rows, users with samples, and items in all histories.
TOTALS = "SELECT count(*), count(DISTINCT u), sum(len(history)) FROM samples"


def broken_windows(max_history: int) -> str:
    """Samples that do not continue the user's previous sample, as ``dataset.leak_check`` counts them."""
    return f"""
        SELECT count(*) FROM (
            SELECT
                history, lag(u) OVER own AS same,
                list_append(lag(history) OVER own, lag(target) OVER own) AS expected
            FROM (SELECT rowid AS n, * FROM samples) WINDOW own AS (PARTITION BY u ORDER BY n)
        )
        WHERE CASE WHEN same IS NULL THEN len(history) > 1 ELSE history <> expected[-{max_history}:] END
    """


def split_view(name: str, condition: str) -> str:
    """The samples of one split as a view, in their order."""
    return f"CREATE VIEW {name} AS SELECT * FROM samples WHERE {condition}"


def split_rows(name: str) -> str:
    """The columns of a split's file, and ``place``."""
    return f"""
        SELECT CAST(u AS BIGINT) AS user, CAST(history AS BIGINT[]) AS history, CAST(target AS BIGINT) AS target, time,
            CAST(place AS BIGINT) AS place
        FROM {name}
    """


def split_size(name: str) -> str:
    """Rows of a split, and items in its histories."""
    return f"SELECT count(*), coalesce(sum(len(history)), 0) FROM {name}"


#: Items that occur in train, in a target or a history: a user's first item is the history of the second event.
TRAINED = "CREATE TABLE trained AS SELECT target AS i FROM train UNION SELECT history[1] FROM train WHERE place = 2"


def unseen_targets(name: str) -> str:
    """Number of items among the targets of a split that do not occur in train."""
    return f"SELECT count(DISTINCT target) FROM {name} WHERE target NOT IN (SELECT i FROM trained)"


LATE_TRAIN_ROWS = "SELECT count(*) FROM train WHERE time >= (SELECT min(time) FROM test)"
