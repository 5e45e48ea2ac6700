"""A whole stack under seeded faults, clients that keep it busy, an auditor who trusts nobody."""
