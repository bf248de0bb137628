"""Which column of a table plays which role: by ``prepare.columns``, else by the usual names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tawin_nemo.config.schema import ColumnsConfig
from tawin_nemo.data.interactions import BRAND, CATEGORY, DESCRIPTION, PRICE
from tawin_nemo.data_prep.raw import EVENT, RATING
from tawin_nemo.types import ITEM, TIME, TITLE, USER
from tawin_nemo.util.errors import ConfigError

#: Usual names of each role, in lower case; the earlier one counts where a file has several.
USUAL = {
    USER: (
        "user", "user_id", "userid", "uid", "reviewerid", "reviewer_id", "customer_id", "customerid", "visitorid",
        "visitor_id", "member_id", "session_id", "sessionid",
    ),
    ITEM: (
        "item", "item_id", "itemid", "iid", "parent_asin", "asin", "product_id", "productid", "movie_id", "movieid",
        "business_id", "article_id", "track_id", "artist_id", "song_id", "book_id", "news_id", "sku",
    ),
    TIME: (
        "time", "timestamp", "ts", "unixreviewtime", "unix_time", "unix_timestamp", "datetime", "event_time", "date",
        "time_stamp", "created_at", "interaction_time",
    ),
    EVENT: ("event", "event_type", "eventtype", "action", "action_type", "behavior", "behaviour", "behavior_type"),
    RATING: ("rating", "ratings", "overall", "stars", "score"),
    TITLE: ("title", "item_title", "movie_title", "product_title", "name", "item_name", "product_name"),
    DESCRIPTION: ("description", "item_description", "product_description", "desc"),
    BRAND: ("brand", "store", "manufacturer"),
    PRICE: ("price", "list_price"),
    CATEGORY: ("category", "categories", "genres", "genre", "category_name", "main_category", "class"),
}  # fmt: skip
LOG_ROLES = (USER, ITEM, TIME)
#: Columns that hold a whole history: such a file has samples, not a log.
SEQUENCES = ("item_id_list", "history_item_id", "item_asins", "history")


def plain(column: str) -> str:
    """The name of a column without RecBole's type, in lower case.

    >>> plain("user_id:token")
    'user_id'
    """
    return column.split(":", 1)[0].strip().lower()


def by_number(given: ColumnsConfig) -> bool:
    """Whether ``prepare.columns`` counts the columns of files without header."""
    return given.user.isdigit() and given.item.isdigit()


def match(columns: Sequence[str], given: ColumnsConfig) -> dict[str, str]:
    """The column of each role that ``columns`` have; a given name counts only as it is written."""
    names = {plain(column): column for column in reversed(columns)}
    named: dict[str, str] = asdict(given)
    roles = {}
    for role, usual in USUAL.items():
        wanted = [named[role]] if named[role] else usual
        exact = [column for column in columns if column == named[role]]
        found = exact or [names[name.lower()] for name in wanted if name.lower() in names]
        if found:
            roles[role] = found[0]
    return roles


def is_log(columns: Sequence[str], given: ColumnsConfig) -> bool:
    """Whether the columns are those of a log: user, item and time, one interaction per row."""
    has_sequence = any(plain(column) in SEQUENCES for column in columns)
    return not has_sequence and set(LOG_ROLES) <= match(columns, given).keys()


def is_items(columns: Sequence[str], given: ColumnsConfig) -> bool:
    """Whether the columns are those of an item file: item and title, no user."""
    roles = match(columns, given)
    return {ITEM, TITLE} <= roles.keys() and USER not in roles


def roles_of(path: Path, columns: Sequence[str], needed: Sequence[str], given: ColumnsConfig) -> dict[str, str]:
    """``match`` for one file. Raises ConfigError that names the file's columns when a ``needed`` role is missing."""
    roles = match(columns, given)
    for role in needed:
        if role not in roles:
            named = asdict(given)[role]
            what = f"prepare.columns.{role}={named} is not in" if named else f"no column is known as the {role} of"
            raise ConfigError(
                f"{what} {path}, which has the columns {', '.join(columns[:30])}; set prepare.columns.{role}"
            )
    return roles
