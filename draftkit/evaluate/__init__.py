"""Measuring a drafter: accepted length, acceptance by position, speed against plain decoding."""
