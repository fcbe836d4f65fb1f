"""How the bench measures: it checks candidates, times them and counts their memory. Also what the suites share."""
