"""Write _claims.md, the tables of the page "What replicates", from the stored outputs of the chapters: `make refresh` runs it."""

from pathlib import Path

from mmn import claims

BOOK = Path(__file__).parent
(BOOK / "_claims.md").write_text(claims.page(BOOK.parent / "notebooks"), encoding="utf-8")
