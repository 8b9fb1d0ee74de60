"""Write _costs.md and _static/costs.png, the table and the figure of the page "What it costs", from what `mmn bench` stored:
`make refresh` runs it."""

from pathlib import Path

import pandas as pd

from mmn import costs
from mmn.paths import data_path

BOOK = Path(__file__).parent
(BOOK / "_costs.md").write_text(costs.page(data_path("results")), encoding="utf-8")
figure = costs.draw(pd.read_csv(data_path("results") / "bench.csv"))
figure.savefig(BOOK / "_static" / "costs.png", dpi=110, metadata={"Software": None})
