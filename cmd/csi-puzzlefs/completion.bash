
# Takes the line apart where the package bash-completion is not there to do it. bash breaks words at
# colons and equal signs, of which LAYOUT:TAG and --flag=value have one: words without a space
# between are put together again. It sets the variables of its caller.
__csi-puzzlefs_init_completion()
{
    local line=${COMP_LINE:0:COMP_POINT} rest word i
    COMPREPLY=() words=()
    for ((i = 0; i <= COMP_CWORD; i++)); do
        rest=${line#"${line%%[![:space:]]*}"}
        word=${COMP_WORDS[i]}
        word=${rest:0:${#word}}
        if ((i > 0)) && [[ ${#rest} -eq ${#line} && (${COMP_WORDS[i]} == [:=]* || ${COMP_WORDS[i - 1]} == *[:=]) ]]; then
            words[${#words[@]} - 1]+=$word
        else
            words+=("$word")
        fi
        line=${rest:${#word}}
    done
    cword=$((${#words[@]} - 1))
    cur=${words[cword]} prev=${words[cword > 0 ? cword - 1 : 0]}
}
