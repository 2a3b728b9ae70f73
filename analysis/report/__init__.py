"""One page that compares runs: reading them, comparing them, charts, the page, Markdown, and the stage."""
