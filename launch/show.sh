# shellcheck shell=bash
# Prints a command as one would type it.
show() {
    local word line='' quote="'"
    for word in "$@"; do
        case $word in
            '' | *[!-A-Za-z0-9_=.,:/@%+]*) word="'${word//$quote/$quote\\$quote$quote}'" ;;
        esac
        line="$line $word"
    done
    printf '%s\n' "${line# }"
}
