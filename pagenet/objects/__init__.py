"""Objects in stores: S3, Google Cloud Storage, Azure, HTTP, all by obstore.

:func:`open_object` is an object as a file that is filled chunk by chunk, as its bytes are asked
for. :func:`open_store` reads and writes whole objects and ranges of them, by name.

obstore is needed once a URI is opened, and not before (``pip install 'pagenet[objects]'``).
"""

from __future__ import annotations

from ._object import RemoteObject, open_object, open_part
from ._store import Store, open_store

__all__ = ["RemoteObject", "Store", "open_object", "open_part", "open_store"]
