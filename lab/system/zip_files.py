"""The directory of a zip file, read within bounds."""

import io
import zipfile

MAX_DIRECTORY = 32 * 2**20  # bytes; a member takes about 100 of them, and 600 in memory


class _Bounded(io.BufferedReader):
    """A file that refuses to read more than `MAX_DIRECTORY` at once."""

    def read(self, size=-1):
        if size is not None and size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"a directory of {size} bytes; allowed: {MAX_DIRECTORY}")
        return super().read(size)


def members(path) -> list[zipfile.ZipInfo]:
    """The members of a zip file, none of them read.

    Raises `OSError`, or `zipfile.BadZipFile` if the file is no zip file or has more members than
    fit into `MAX_DIRECTORY`.
    """
    try:
        with _Bounded(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
            return archive.infolist()
    except OSError:
        raise
    except Exception as error:  # zipfile raises errors of many kinds for damaged files
        raise zipfile.BadZipFile(str(error) or repr(error)) from None
