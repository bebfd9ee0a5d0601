"""Ways to run a network → checked answers, then times taken in turn; shown as tables and figures."""
