//! Just enough Rust to tell code from comments and literals.

/// `text` with every comment and the inside of every string and character literal replaced by spaces.
///
/// Lines stay where they are, so that a finding in the result points into the original.
pub(crate) fn blank(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = match chars[at] {
            '/' if chars.get(at + 1) == Some(&'/') => find(&chars, at, |c| c == '\n'),
            '/' if chars.get(at + 1) == Some(&'*') => block_comment_end(&chars, at),
            '"' => quoted_end(&chars, at, '"'),
            'r' if starts_raw(&chars, at) => raw_string_end(&chars, at),
            '\'' if is_char_literal(&chars, at) => quoted_end(&chars, at, '\''),
            c => {
                out.push(c);
                at += 1;
                continue;
            }
        };
        out.extend(chars[at..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
        at = end;
    }
    out
}

/// Byte offsets at which `word` stands in `code` as a whole identifier.
pub(crate) fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |&at| !code[..at].ends_with(part) && !code[at + word.len()..].starts_with(part))
}

/// The line, from 1, of a byte offset.
pub(crate) fn line_of(text: &str, offset: usize) -> usize {
    text[..offset].matches('\n').count() + 1
}

/// The text between the parenthesis at the start of `code` (after spaces) and its partner.
pub(crate) fn in_parentheses(code: &str) -> Option<&str> {
    let inside = code.trim_start().strip_prefix('(')?;
    let mut depth = 1;
    for (at, c) in inside.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&inside[..at]);
        }
    }
    None
}

fn find(chars: &[char], from: usize, wanted: impl Fn(char) -> bool) -> usize {
    chars[from..].iter().position(|&c| wanted(c)).map_or(chars.len(), |n| from + n)
}

fn block_comment_end(chars: &[char], start: usize) -> usize {
    let mut depth = 0;
    let mut at = start;
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at.min(chars.len())
}

fn quoted_end(chars: &[char], start: usize, quote: char) -> usize {
    let mut at = start + 1;
    while at < chars.len() {
        match chars[at] {
            '\\' => at += 2,
            c if c == quote => return at + 1,
            _ => at += 1,
        }
    }
    chars.len()
}

/// Whether the `r` at `at` begins a raw string: not the end of an identifier, and hashes and a quote follow.
fn starts_raw(chars: &[char], at: usize) -> bool {
    let before = at.checked_sub(1).map(|b| chars[b]);
    // `br"…"` and `cr"…"` are raw strings too; any other letter before makes the `r` the end of a name.
    let prefix_ends_name = |p: char| {
        let earlier = at.checked_sub(2).map(|b| chars[b]);
        !matches!(p, 'b' | 'c') || earlier.is_some_and(|c| c.is_alphanumeric() || c == '_')
    };
    if before.is_some_and(|p| (p.is_alphanumeric() || p == '_') && prefix_ends_name(p)) {
        return false;
    }
    chars.get(find(chars, at + 1, |c| c != '#')) == Some(&'"')
}

fn raw_string_end(chars: &[char], start: usize) -> usize {
    let quote = find(chars, start + 1, |c| c != '#');
    let hashes = quote - start - 1;
    let mut at = quote + 1;
    while at < chars.len() {
        let closes = chars[at] == '"' && chars[at + 1..].iter().take(hashes).filter(|&&c| c == '#').count() == hashes;
        if closes {
            return at + 1 + hashes;
        }
        at += 1;
    }
    chars.len()
}

/// Whether the `'` at `at` begins a character literal and not a lifetime or a label.
fn is_char_literal(chars: &[char], at: usize) -> bool {
    match chars.get(at + 1) {
        Some('\\') => true,
        Some(_) => chars.get(at + 2) == Some(&'\''),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, blanked: &str) {
        assert_eq!(blank(text), blanked, "{text}");
    }

    #[test]
    fn comments_and_literals_go_and_code_stays() {
        check("a // b\nc", "a     \nc");
        check("a /* b /* c */ d */ e", "a                   e");
        check(r#"f("x\"y") + 1"#, "f(      ) + 1");
        check("r#\"a\"b\"# z", "         z");
        check(r#"br"a" bar"b""#, "b     bar   ");
        check("'x' 'a: loop {} '\\'' <'static>", "    'a: loop {}      <'static>");
        check("\"two\nlines\"", "    \n      ");
        check("\"open", "     ");
    }

    #[test]
    fn words_are_whole_identifiers() {
        let code = "unsafe_code not_unsafe unsafe{";
        assert_eq!(words(code, "unsafe").collect::<Vec<_>>(), [23]);
    }

    #[test]
    fn parentheses_nest() {
        assert_eq!(in_parentheses(" (a(b), c) d"), Some("a(b), c"));
        assert_eq!(in_parentheses("(never closed"), None);
        assert_eq!(in_parentheses("none"), None);
    }
}
