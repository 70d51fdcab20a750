"""Databases on a server, such as PostgreSQL: checked before MLflow opens them.

MLflow tries for two minutes, without a word, to reach a server that is down or that refuses a password, and
makes its tables without a lock.
"""

import re
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

KINDS = ("postgresql", "mysql", "mssql")
_URI = re.compile(rf"({'|'.join(KINDS)})(\+\w+)?://")
_CONNECT_TIMEOUT = 4  # seconds
_ATTEMPTS, _PAUSE = 4, 1.0  # seconds between two; another process makes the tables in less than that
_INSTALL = {"psycopg": 'pip install "psycopg[binary]"'}


def is_database_server(uri: str) -> bool:
    """Whether a URI is that of a database on a server."""
    return _URI.match(uri) is not None


def check_connection(uri: str) -> None:
    """Connect once to the database of such a URI; other URIs pass.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the server does not answer within seconds, or refuses the user.
        ModuleNotFoundError: the database's driver is not installed.
    """
    if not is_database_server(uri):
        return
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    # Drivers have no common name for it; those of SQL Server have a timeout of their own by default.
    timeout = {} if uri.startswith("mssql") else {"connect_timeout": _CONNECT_TIMEOUT}
    with create_engine(uri, connect_args=timeout, poolclass=NullPool).connect():
        pass


def first_use(uri: str, use: Callable[[], T]) -> T:
    """Return what `use` returns, which makes MLflow's tables if the store has none.

    On a server, another process may be making them: then one of both fails, and finds them a moment later.
    """
    for _ in range(_ATTEMPTS - 1 if is_database_server(uri) else 0):
        try:
            return use()
        except Exception:  # of SQLAlchemy, of the driver or MLflow's own
            time.sleep(_PAUSE)
    return use()


def missing_driver(error: ModuleNotFoundError) -> str:
    """What is missing and what to do, in words."""
    package = error.name or str(error)
    return f"it needs the Python package {package}: {_INSTALL.get(package, 'install it')}"
