"""What belongs to persons: mail addresses, IP addresses, phone numbers, accounts and cards.

    >>> hidden("Write to jo@example.org or call +44 20 7946 0958.")
    ('Write to <EMAIL> or call <PHONE>.', {'EMAIL': 1, 'PHONE': 1})

What has check digits is taken only if they are right: IBANs by ISO 7064 (mod 97), cards by Luhn. So
other long numbers stay. A tag holds nothing that is found again: hiding twice is hiding once.
"""

import ipaddress
import re
from collections import Counter

EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[a-zA-Z]{2,24}\b")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
CARD = re.compile(r"(?<![\w.+-])(?:\d{13,19}"  # in one, or as they are printed: 4 6 5, 4 4 4 4
                  r"|\d{4}([ -])\d{6}\1\d{5}|\d{4}([ -])\d{4}\2\d{4}\2\d{4})(?![\w-])")
IP = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,7})"
                r"(?![\w:]|\.\w)")
PHONE = re.compile(r"(?<![\w.+-])(?:"
                   r"\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"
                   r"|\(\d{3}\)[ .-]?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-]|\.\d)")


def hidden(text: str) -> tuple[str, dict[str, int]]:
    """(the text with a tag for each of them, how many of each kind)."""
    found, before = Counter(), None
    while text != before:  # what stands beside a tag may be found now
        before = text
        for name, pattern, right in KINDS:
            def tag(match):
                if not right(match[0]):
                    return match[0]
                found[name] += 1
                return f"<{name}>"
            text = pattern.sub(tag, text)
    return text, dict(found)


def is_iban(text: str) -> bool:
    """Are its check digits right? ISO 13616: the first four to the end, letters as 10 to 35.

    >>> is_iban("GB82 WEST 1234 5698 7654 32"), is_iban("GB83 WEST 1234 5698 7654 32")
    (True, False)
    """
    text = text.replace(" ", "")
    number = int("".join(str(int(c, 36)) for c in text[4:] + text[:4]))
    return 15 <= len(text) <= 34 and number % 97 == 1


def is_card(text: str) -> bool:
    """Is it 13 to 19 digits whose sum is right? Luhn 1960: every second digit from the right is
    doubled, and counts with its digits' sum.

    >>> is_card("4111 1111 1111 1111"), is_card("4111 1111 1111 1112")
    (True, False)
    """
    digits = [int(c) for c in text if c.isdigit()]
    total = sum(digits[-1::-2]) + sum(sum(divmod(2 * d, 10)) for d in digits[-2::-2])
    return 13 <= len(digits) <= 19 and any(digits) and total % 10 == 0


def is_ip(text: str) -> bool:
    """Is it an address that somebody can have? Of version 6 it has a group of three digits or more,
    so that a slice such as 1::2 stays.

    >>> is_ip("192.0.2.1"), is_ip("127.0.0.1"), is_ip("2001:db8::1"), is_ip("1::2")
    (True, False, True, False)
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return (not address.is_loopback and not address.is_unspecified
            and (address.version == 4 or max(map(len, text.split(":"))) > 2))


def is_phone(text: str) -> bool:
    """Does it have 8 to 15 digits? (E.164 has at most 15.)"""
    return 8 <= sum(map(str.isdigit, text)) <= 15


# A card's digits could be taken for a phone number, and an IBAN's for a card: the surest is first.
KINDS = (("EMAIL", EMAIL, lambda text: True), ("IBAN", IBAN, is_iban), ("CARD", CARD, is_card),
         ("IP", IP, is_ip), ("PHONE", PHONE, is_phone))
