"""A bucket for tests, `bucket://…`: objects in a folder, as little able as an object store.

No object can be appended to, renamed or made only where there is none; folders are parts of names;
an object arrives whole or not at all. The bytes outlive a process, so a process can be killed.
`BUCKET_FOLDER` names the folder.
"""

import io
import os
import pathlib
import secrets
import urllib.parse

from fsspec import AbstractFileSystem

FOLDER = "BUCKET_FOLDER"


class BucketFileSystem(AbstractFileSystem):
    protocol = "bucket"
    cachable = False  # the folder may be another one in the next test

    def _objects(self):
        root = pathlib.Path(os.environ[FOLDER])
        root.mkdir(exist_ok=True)
        names = (path.name for path in root.iterdir() if not path.name.startswith(".tmp-"))
        return {urllib.parse.unquote(name): root / name for name in names}

    def _object(self, path):
        name = urllib.parse.quote(self._strip_protocol(path), safe="")
        return pathlib.Path(os.environ[FOLDER]) / name

    def _info(self, name, file):
        stat = file.stat()
        return {"name": name, "type": "file", "size": stat.st_size, "mtime": stat.st_mtime_ns}

    def ls(self, path, detail=True, **kwargs):
        path, found = self._strip_protocol(path).rstrip("/"), {}
        for name, file in self._objects().items():
            if name == path:
                found[name] = self._info(name, file)
            elif name.startswith(path + "/") or not path:
                rest = name[len(path) + 1 :] if path else name
                inner = f"{path}/{rest.split('/')[0]}".lstrip("/")
                if "/" in rest:
                    found[inner] = {"name": inner, "type": "directory", "size": 0}
                else:
                    found[inner] = self._info(name, file)
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else sorted(found)

    def _open(self, path, mode="rb", **kwargs):
        if mode == "rb":
            return io.BytesIO(self._object(path).read_bytes())
        if mode == "wb":
            return Upload(self, path)
        raise NotImplementedError(f"mode {mode!r}: no object is changed once it is there")

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        # A writer that asks for `create` gets no more than this: it is not exclusive.
        file = self._object(path)
        file.parent.mkdir(exist_ok=True)
        fresh = file.with_name(f".tmp-{secrets.token_hex(8)}")
        fresh.write_bytes(value)
        fresh.replace(file)

    def put_file(self, lpath, rpath, callback=None, mode="overwrite", **kwargs):
        self.pipe_file(rpath, pathlib.Path(lpath).read_bytes())

    def rm_file(self, path):
        self._object(path).unlink()

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def cp_file(self, path1, path2, **kwargs):
        raise NotImplementedError("no copy, and so no rename")


class Upload(io.BytesIO):
    """An object on its way, which is there once it is closed."""

    def __init__(self, fs, path):
        super().__init__()
        self._fs, self._path = fs, path

    def close(self):
        if not self.closed:
            self._fs.pipe_file(self._path, self.getvalue())
        super().close()
