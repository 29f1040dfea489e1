"""Controllers, one file each: how many tokens to draft next? From what came of earlier cycles."""
