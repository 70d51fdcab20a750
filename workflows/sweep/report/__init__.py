"""report.html of a finished sweep: which model won, why and by how much, and all that was measured.

- `standings` knows who is the champion, the runner-up and the choice of the mean squared error, and how the
  trials differ from the champion.
- `findings` says it in words.
- `tables` and the modules of figures show it, these by `chart` and `drawing`; `importance` measures how much
  each parameter matters.
- `commands` are those that go on from the sweep, or repeat it.
- `write_report` puts the page together.
"""
