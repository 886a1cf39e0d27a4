"""Objects in stores: S3, Google Cloud Storage, Azure, HTTP, all by obstore; and exports of NBD
servers, by libnbd.

:func:`open_object` is an object as a file that is filled chunk by chunk, as its bytes are asked
for; they may come from another :class:`Origin` than a store. :func:`open_store` reads and writes
whole objects and ranges of them, by name.

obstore (``pip install 'pagenet[objects]'``) and libnbd are needed once a URI is opened, and not
before.
"""

from __future__ import annotations

from ._object import RemoteObject, open_object, open_part, origin_of
from ._origin import ObjectStat, Origin, Refused, Transient, object_identity
from ._store import Store, StoredObject, open_store

__all__ = [
    "ObjectStat",
    "Origin",
    "Refused",
    "RemoteObject",
    "Store",
    "StoredObject",
    "Transient",
    "object_identity",
    "open_object",
    "open_part",
    "open_store",
    "origin_of",
]
